"""One network sliced to many budgets beside networks planned and recovered for each of them.

The demo network, trained once at ranks that change from step to step, and sliced to shares of the
dense MACs; and for each share a plan of its own, recovered as long. Writes elastic.json, in which
what is there is not done again, and a table of docs/recovery.md.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
import typer
from race import between_markers, machine, markdown_table, save

import rankfold
from rankfold.demo import accuracy, make_data, make_model, make_test
from rankfold.elastic import steps_down_to

HERE = Path(__file__).parent
RESULTS = HERE / "elastic.json"
DOCUMENT = HERE.parent / "docs" / "recovery.md"
GREATEST, SMALLEST = 0.5, 0.15
BUDGETS = (0.5, 0.4, 0.3, 0.25, 0.2, 0.15)
OPTIONS: dict[str, Any] = {"epochs": 6, "learning_rate": 1e-3, "patience": 6}


def main(threads: int = 2) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    facts: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    facts["machine"] = machine()
    model, data, test = make_model(), make_data(), make_test()
    facts["dense"] = accuracy(model, test)
    analysis = rankfold.analyze(model, data)
    found = facts.setdefault("budgets", {})
    if "elastic seconds" not in facts:
        elastic = rankfold.factorize(model, analysis.plan(macs=GREATEST))
        done = rankfold.recover_elastic(
            elastic,
            analysis,
            data,
            teacher=model,
            budgets=steps_down_to(SMALLEST, {"macs": GREATEST}),
            **OPTIONS,
        )
        slicing = 0.0
        for budget in BUDGETS:
            start = time.perf_counter()
            small = rankfold.slice_to(elastic, macs=budget)
            slicing = max(slicing, time.perf_counter() - start)
            found[str(budget)] = {"sliced": accuracy(small.eval(), test)}
        facts |= {"elastic seconds": done.seconds, "slicing seconds": slicing}
        print(facts, flush=True)
        save(RESULTS, facts)
    for budget in BUDGETS:
        row = found[str(budget)]
        if "recovered" in row:
            continue
        small = rankfold.factorize(model, analysis.plan(macs=budget))
        row["factorized"] = accuracy(small.eval(), test)
        done = rankfold.recover(small, data, teacher=model, **OPTIONS)
        row |= {"recovered": accuracy(small.eval(), test), "seconds": done.seconds}
        print(budget, row, flush=True)
        save(RESULTS, facts)
    write_document(facts)


def write_document(facts: dict[str, Any]) -> None:
    rows = facts["budgets"]
    lines = [
        (title, *(f"{100 * row[key]:.1f}" for row in rows.values()))
        for title, key in (
            ("planned for each, factorized", "factorized"),
            ("planned for each, recovered for each", "recovered"),
            ("one network, sliced", "sliced"),
        )
    ]
    header = (f"dense {100 * facts['dense']:.1f}", *(f"{100 * float(b):.0f} %" for b in rows))
    each = sum(row["seconds"] for row in rows.values())
    on = ", ".join(f"{name} {value}" for name, value in facts["machine"].items())
    text = (
        f"{markdown_table(header, lines)}\nTraining: {facts['elastic seconds']:.0f} s once, or "
        f"{each:.0f} s for all of them apart; a slice takes {facts['slicing seconds']:.2f} s.\n\n"
        f"Measured on: {on}.\n"
    )
    between_markers(DOCUMENT, "elastic", text)


if __name__ == "__main__":
    typer.run(main)
