"""Latency asked for, predicted and measured, with the metric before and after recovery.

Writes benchmarks/latency.json and a table of docs/planning.md.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from race import between_markers, machine, markdown_table, save
from torch import nn

import rankfold
from rankfold.measure import in_fastest_memory_format
from rankfold.search import plan_to_latency

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "planning.md"


@dataclass(frozen=True)
class Case:
    model: nn.Module
    data: list[Any]  # the first batch is what is timed
    score: Callable[[nn.Module], float]
    latency: float
    epochs: int = 3


def crepe() -> Case:
    import crepe

    test = crepe.make_test()
    return Case(crepe.make_model(), crepe.make_data(), lambda m: crepe.accuracy(m, test), 0.33)


def fashion_mnist() -> Case:
    import fashion_mnist

    test = fashion_mnist.make_test()
    model, data = fashion_mnist.make_model(), fashion_mnist.make_data()
    return Case(model, data, lambda m: rankfold.accuracy(m, test), 0.5)


def minilm() -> Case:
    import minilm

    return Case(minilm.make_model(), minilm.make_data(), lambda m: minilm.scores(m)[0], 0.6, 0)


def scene_text() -> Case:
    """The recogniser's convolutions; its LSTMs, which no method takes yet, stay."""
    sys.path.append(str(HERE.parent / "examples"))
    from ocr_models import make_recogniser
    from rendered_text import split_fonts, word_batches
    from scene_text import words_right

    fonts, held_out = split_fonts()
    data = [images[:1] for images, _ in word_batches(640, fonts, seed=0, batch=8)]
    test = word_batches(1000, held_out, seed=1)
    data.insert(0, data.pop(len(data) // 2))  # a word of middling width is timed
    return Case(make_recogniser(), data, lambda m: words_right(m, test), 0.7, 0)


CASES = {
    "six convolutions": fashion_mnist,
    "CREPE": crepe,
    "MiniLM": minilm,
    "english_g2": scene_text,
}


def run(name: str, case: Case) -> dict[str, Any]:
    start = time.perf_counter()
    analysis = rankfold.analyze(case.model, case.data, timed=True)
    analysed = time.perf_counter() - start
    timed = plan_to_latency(
        case.model,
        analysis,
        case.latency,
        case.data[0],
        lambda aim: analysis.plan(latency=aim),
    )
    dense_score = case.score(case.model)
    factorized_score = case.score(timed.model)
    recovered_score = None
    if case.epochs:
        rankfold.recover(timed.model, case.data, teacher=case.model, epochs=case.epochs)
        recovered_score = case.score(timed.model.eval())
    small = in_fastest_memory_format(timed.model, case.data[0])
    dense = in_fastest_memory_format(case.model, case.data[0])
    comparison = rankfold.measure(dense, small, case.data[:1])
    row = {
        "case": name,
        "asked": case.latency,
        "predicted_ms": timed.plan.after.latency_ms,
        "dense_ms": comparison.before.latency_ms,
        "measured_ms": comparison.after.latency_ms,
        "share_when_planned": timed.share,
        "macs_kept": timed.plan.after.macs / timed.plan.before.macs,
        "scores": [dense_score, factorized_score, recovered_score],
        "metric": analysis.metric,
        "analyze_seconds": analysed,
    }
    print(row, flush=True)
    return row


def main(
    only: Annotated[list[str] | None, typer.Option(help="a case; may be repeated")] = None,
    threads: int = 2,
    out: Path = HERE / "latency.json",
) -> None:
    torch.set_num_threads(threads)
    facts = json.loads(out.read_text()) if out.exists() else {"cases": {}}
    facts["machine"] = machine()
    for name in only or CASES:
        torch.manual_seed(0)
        facts["cases"][name] = run(name, CASES[name]())
        save(out, facts)
    header = ("", "asked", "measured", "dense", "factorized", "predicted", "MACs kept", "metric")
    rows = [_row(facts["cases"][name]) for name in CASES if name in facts["cases"]]
    between_markers(DOCUMENT, "latency", markdown_table(header, rows))


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    scores = " → ".join(f"{score:.3f}" for score in row["scores"] if score is not None)
    return (
        row["case"],
        f"{row['asked']:.2f}",
        f"{row['measured_ms'] / row['dense_ms']:.2f}",
        f"{row['dense_ms']:.1f} ms",
        f"{row['measured_ms']:.1f} ms",
        f"{row['predicted_ms']:.1f} ms",
        f"{row['macs_kept']:.0%}",
        scores,
    )


if __name__ == "__main__":
    typer.run(main)
