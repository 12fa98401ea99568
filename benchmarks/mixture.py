"""The plan that may mix methods beside plans of one method each, at equal measured latency.

Writes benchmarks/mixture.json, in which what is there is not done again, and tables of
docs/methods.md: for each network the metric before any recovery, and the measured share of the
dense time, which each plan is brought to by trying (`plan_to_latency`). A plan of one method takes
SVD for the layers that the method does not take. "Contest" is the plan that a contest of
`rankfold.compress` takes of them: the best one on other inputs than those of the score.
"""

import json
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from methods import DOCUMENT
from paired import paired_times, restricted
from race import between_markers, machine, markdown_table, save
from torch import nn

import rankfold
from rankfold.analysis import Analysis
from rankfold.errors import BudgetError
from rankfold.plan import Plan
from rankfold.search import plan_to_latency, teacher_agreement

HERE = Path(__file__).parent
METHODS = ("tucker2", "svd", "separable", "separable3", "block-term")
FAST = ("tucker2", "svd", "separable")  # to fit, also for large layers


@dataclass(frozen=True)
class Case:
    model: nn.Module
    data: list[Any]  # the first batch is what is timed
    score: Callable[[nn.Module], float]
    validate: Callable[[nn.Module], float]  # likewise, on inputs that a user might choose by
    budgets: tuple[float, ...] = (0.6, 0.45, 0.33)  # of the dense latency
    methods: tuple[str, ...] = METHODS
    layers: str = "*"


def demo() -> Case:
    from rankfold.demo import accuracy, make_data, make_model, make_test

    model, data, test = make_model().eval(), make_data(), make_test()
    agreement = teacher_agreement(model)
    return Case(model, data, lambda m: accuracy(m, test), lambda m: agreement(m, data))


def crepe() -> Case:
    import crepe

    test, others = crepe.make_test(), crepe.make_test(seed=7)
    return Case(
        crepe.make_model(),
        crepe.make_data(),
        lambda m: crepe.accuracy(m, test),
        lambda m: crepe.accuracy(m, others),
        (0.5, 0.33),
        FAST,
    )


def english_g2() -> Case:
    sys.path.append(str(HERE.parent / "examples"))
    from ocr_models import make_recogniser
    from rendered_text import split_fonts, word_batches
    from scene_text import words_right

    fonts, held_out = split_fonts()
    words = [images for images, _ in word_batches(1000, fonts, seed=0)]
    middle = sorted(words, key=lambda images: images.shape[-1])[len(words) // 2]
    test, others = word_batches(1000, held_out, seed=1), word_batches(500, fonts, seed=7)
    data = [middle[:1], *words]
    budgets = (0.85, 0.75, 0.65)  # about half of the time is outside of these layers
    layers = "network.FeatureExtraction*"
    model = make_recogniser()
    return Case(
        model,
        data,
        lambda m: words_right(m.eval(), test),
        lambda m: words_right(m.eval(), others),
        budgets,
        layers=layers,
    )


def craft() -> Case:
    sys.path.append(str(HERE.parent / "examples"))
    from ocr_models import make_detector
    from rendered_text import page_batches, split_fonts
    from text_detector import agreement

    fonts, held_out = split_fonts()
    model, test = make_detector(), page_batches(16, held_out, seed=1)
    pages = page_batches(24, fonts, seed=0)
    data = [pages[0][:1], *pages]
    others = page_batches(16, fonts, seed=3)
    return Case(
        model,
        data,
        lambda m: agreement(m.eval(), model, test),
        lambda m: agreement(m.eval(), model, others),
        (0.4,),
        FAST,
    )


def character_network() -> Case:
    import characters

    test = characters.make_test()
    model, data = characters.make_model(), characters.make_data()
    agreement = teacher_agreement(model)
    return Case(
        model,
        data,
        lambda m: rankfold.accuracy(m, test),
        lambda m: agreement(m, data),
        (0.5, 0.33, 0.2),
    )


CASES = {
    "demo": demo,
    "english_g2": english_g2,
    "CREPE": crepe,
    "CRAFT": craft,
    "characters": character_network,
}


def analysis_of(name: str, case: Case) -> Analysis:
    """One that is kept, without times, or a new one."""
    kept = HERE / "cache" / "mixture" / name
    if kept.exists():
        return Analysis.load(kept)
    methods = [*case.methods, "full-rank"]
    analysis = rankfold.analyze(case.model, case.data, methods=methods, layers=case.layers)
    analysis.save(kept)
    return analysis


def compare(name: str, case: Case, done: Collection[tuple[str, float]]) -> Iterator[dict[str, Any]]:
    """The rows that are not done yet."""
    analysis = rankfold.with_timings(analysis_of(name, case), case.model, case.data)
    print(f"metric: {analysis.metric}", flush=True)
    if ("dense", 1.0) not in done:
        score = case.score(case.model)
        yield {"contender": "dense", "score": score, "budget": 1.0, "measured": 1.0}
    for contender in ("mixture", *case.methods):
        limited = analysis
        if contender != "mixture":
            limited = restricted(analysis, [contender], instead="svd")
        for budget in case.budgets:
            if (contender, budget) in done:
                continue
            try:
                found = plan_to_latency(
                    case.model,
                    limited,
                    budget,
                    case.data[0],
                    lambda aim, limited=limited: limited.plan(latency=aim),
                )
            except BudgetError as error:
                print(contender, budget, error, flush=True)
                continue
            row = {
                "contender": contender,
                "budget": budget,
                "measured": share_of_time(case, found.model),
                "macs_kept": found.plan.after.macs / found.plan.before.macs,
                "score": case.score(found.model),
                "validated": case.validate(found.model),
                "methods": methods_of(found.plan),
            }
            print(json.dumps(row), flush=True)
            yield row


def methods_of(plan: Plan) -> dict[str, int]:
    used = [entry.method or "" for entry in plan.factorized]
    return {method: used.count(method) for method in dict.fromkeys(used)}


def share_of_time(case: Case, small: nn.Module) -> float:
    """Each in the memory format in which it is faster."""
    dense, ours = paired_times(case.model, small, case.data[0])
    return ours / dense


def main(
    only: Annotated[list[str] | None, typer.Option(help="a network; may be repeated")] = None,
    analyse: Annotated[bool, typer.Option(help="only that, to time another time")] = False,
    threads: int = 2,
    out: Path = HERE / "mixture.json",
) -> None:
    torch.set_num_threads(threads)
    facts = json.loads(out.read_text()) if out.exists() else {"networks": {}}
    if analyse:
        for network in only or CASES:
            torch.manual_seed(0)
            analysis_of(network, CASES[network]())
        return
    facts["machine"] = machine()
    for network in only or CASES:
        torch.manual_seed(0)
        rows = facts["networks"].setdefault(network, [])
        done = {(row["contender"], row["budget"]) for row in rows}
        for row in compare(network, CASES[network](), done):
            rows.append(row)
            save(out, facts)
    write_document(facts)


def write_document(facts: dict[str, Any]) -> None:
    on = ", ".join(f"{name} {value}" for name, value in facts["machine"].items())
    tables = [f"{table(network, rows)}\n" for network, rows in facts["networks"].items()]
    between_markers(DOCUMENT, "mixture", "\n".join([*tables, f"Measured on: {on}.\n"]))


def table(network: str, rows: list[dict[str, Any]]) -> str:
    """Contenders by budgets."""
    (dense,) = (row for row in rows if row["contender"] == "dense")
    others = [row for row in rows if row is not dense]
    budgets = sorted({row["budget"] for row in others}, reverse=True)
    lines = []
    names = {row["contender"] for row in others}
    if all("validated" in row for row in others):
        best = [max((r for r in others if r["budget"] == b), key=_validated) for b in budgets]
        lines.append(("contest", *map(_cell, best)))
    for name in (one for one in ("mixture", *METHODS) if one in names):
        cells = {row["budget"]: row for row in others if row["contender"] == name}
        lines.append((name, *(_cell(cells.get(budget)) for budget in budgets)))
    title = f"{network} (dense {100 * dense['score']:.1f}): score, % / measured time"
    return markdown_table((title, *(f"{budget:.0%} of time" for budget in budgets)), lines)


def _validated(row: dict[str, Any]) -> float:
    return row["validated"]


def _cell(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{100 * row['score']:.1f} / {row['measured']:.2f}"


if __name__ == "__main__":
    typer.run(main)
