"""A contest of plans of equal cost: what the metric says of each, and what it would say elsewhere.

The plans are those that `compress(contest=True)` tries: of all methods, of one wherever it can be,
of all but one, and for a latency by MACs, which alone is brought to it by the clock here: the
others take what they predict. Each is judged as the contest judges, by agreement with the dense
network on other words in the fonts that it is calibrated on, and by words in fonts that nothing has
seen. Writes contest.json, in which what is there is not done again, and tables of docs/planning.md.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer
from paired import paired_times
from race import between_markers, machine, markdown_table, save
from suite import cases
from torch import nn

import rankfold
from rankfold.analysis.divergence import Judge
from rankfold.batches import run
from rankfold.errors import BudgetError
from rankfold.plan import Plan
from rankfold.search import contenders, plan_to_latency

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "planning.md"
NAME = "english_g2"
BUDGETS = (("macs", 0.5), ("macs", 0.35), ("latency", 0.6))
SAID = {"macs": "of the MACs", "latency": "of the time"}


def contest(budgets: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    """A row for each plan and budget: its predicted loss, and the words that are read right."""
    case = cases.make(NAME)
    model = case.make_model().eval()
    assert case.agreement is not None and case.validation is not None
    judge = Judge.of(model, run, [images for images, _ in case.validation], None)
    timed = rankfold.with_timings(rankfold.analyze(model, case.data), model, case.data)
    competing = contenders(timed)
    found = []
    for budget, share in budgets:
        attempts = {name: partial(one.plan, **{budget: share}) for name, one in competing.items()}
        if budget == "latency":
            attempts["all, by MACs"] = partial(plan_by_macs, model, timed, share, case.data[0])
        for name, attempt in attempts.items():
            try:
                plan = attempt()
            except BudgetError:
                continue
            small = rankfold.factorize(model, plan).eval()
            dense_ms, ours_ms = paired_times(model, small, case.data[0])
            row = {
                "budget": budget,
                "share": share,
                "plan": name,
                "predicted": plan.loss,
                "measured": judge.divergence_of(small),
                "time": ours_ms / dense_ms,
                "judged": case.agreement(small, case.validation),
                "elsewhere": case.score(small),
            }
            print(json.dumps(row), flush=True)
            found.append(row)
    return found


def plan_by_macs(
    model: nn.Module, timed: rankfold.Analysis, share: float, batch: torch.Tensor
) -> Plan:
    """For a share of the time, by the clock of the whole network."""
    return plan_to_latency(model, timed, share, batch, lambda aim: timed.plan(macs=aim)).plan


def main(threads: int = 2, out: Path = HERE / "contest.json") -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    facts: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"rows": []}
    done = {(row["budget"], row["share"]) for row in facts["rows"]}
    if missing := [one for one in BUDGETS if one not in done]:
        facts |= {"machine": machine(), "rows": facts["rows"] + contest(missing)}
        save(out, facts)
    write_document(facts)


def write_document(facts: dict[str, Any]) -> None:
    """Plans by how they are judged; the first of the best is what the contest takes."""
    tables = []
    for budget, share in BUDGETS:
        rows = [row for row in facts["rows"] if (row["budget"], row["share"]) == (budget, share)]
        header = (
            f"at {share:.0%} {SAID[budget]}",
            "predicted loss",
            "measured",
            "time",
            "judged, %",
            "elsewhere, %",
        )
        lines = [
            (
                row["plan"],
                f"{row['predicted']:.3g}",
                f"{row['measured']:.3g}",
                f"{row['time']:.2f}",
                f"{100 * row['judged']:.1f}",
                f"{100 * row['elsewhere']:.1f}",
            )
            for row in sorted(rows, key=lambda row: -row["judged"])
        ]
        tables.append(markdown_table(header, lines))
    on = ", ".join(f"{name} {value}" for name, value in facts["machine"].items())
    between_markers(DOCUMENT, "contest", "\n".join(tables) + f"\nMeasured on: {on}.\n")


if __name__ == "__main__":
    typer.run(main)
