"""Latency asked for, predicted and measured, with the metric before and after recovery.

Writes benchmarks/latency.json and a table of docs/planning.md. Analyses are kept in
benchmarks/cache and used again with --reuse.
"""

import json
import random
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
from rankfold.analysis import Analysis
from rankfold.measure import in_fastest_memory_format
from rankfold.refit import refit
from rankfold.runtime import Runtime
from rankfold.search import plan_to_latency

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "planning.md"


@dataclass(frozen=True)
class Case:
    model: nn.Module
    data: list[Any]  # the first batch is what is timed
    score: Callable[[nn.Module], float]
    latency: float
    recovery: list[Any] | None = None  # batches; None: not recovered
    epochs: int = 3
    learning_rate: float = 3e-4


def crepe() -> Case:
    import crepe

    test, data = crepe.make_test(), crepe.make_data()
    return Case(crepe.make_model(), data, lambda m: crepe.accuracy(m, test), 0.33, data)


def fashion_mnist() -> Case:
    import fashion_mnist

    test = fashion_mnist.make_test()
    model, data = fashion_mnist.make_model(), fashion_mnist.make_data()
    return Case(model, data, lambda m: rankfold.accuracy(m, test), 0.5, data)


def minilm() -> Case:
    import minilm

    return Case(minilm.make_model(), minilm.make_data(), lambda m: minilm.scores(m)[0], 0.6)


def scene_text() -> Case:
    sys.path.append(str(HERE.parent / "examples"))
    from ocr_models import make_recogniser
    from rendered_text import split_fonts, word_batches
    from scene_text import words_right

    fonts, held_out = split_fonts()
    words = [images for images, _ in word_batches(3000, fonts, seed=0)]
    test = word_batches(1000, held_out, seed=1)
    # A single word of middling width is timed.
    widths = sorted(words, key=lambda images: images.shape[-1])
    random.Random(0).shuffle(words)
    data = [widths[len(widths) // 2][:1], *words]
    model = make_recogniser()
    return Case(model, data, lambda m: words_right(m, test), 0.6, words, 6, 5e-4)


CASES = {
    "six convolutions": fashion_mnist,
    "CREPE": crepe,
    "MiniLM": minilm,
    "english_g2": scene_text,
}


def run(name: str, case: Case, runtime: Runtime, reuse: bool) -> dict[str, Any]:
    analysis, analysed = analysis_of(name, case, reuse)
    start = time.perf_counter()
    analysis = rankfold.with_timings(analysis, case.model, case.data, runtime=runtime)
    assert analysis.timing is not None
    timed_seconds = time.perf_counter() - start
    start = time.perf_counter()
    timed = plan_to_latency(
        case.model, analysis, case.latency, case.data[0], lambda aim: analysis.plan(latency=aim)
    )
    row: dict[str, Any] = {
        "case": name,
        "runtime": runtime,
        "asked": case.latency,
        "metric": analysis.metric,
        "analyze_seconds": analysed,
        "timing_seconds": timed_seconds,
        "planning_seconds": time.perf_counter() - start,
        "macs_kept": timed.plan.after.macs / timed.plan.before.macs,
        "plan": {e.name: [e.method, e.rank] for e in timed.plan.factorized},
    }
    small = in_fastest_memory_format(timed.model, case.data[0], runtime=runtime)
    dense = in_fastest_memory_format(case.model, case.data[0], runtime=runtime)
    comparison = rankfold.measure(dense, small, case.data[:1], runtime=runtime)
    row["dense_ms"] = comparison.before.latency_ms
    row["measured_ms"] = comparison.after.latency_ms
    row["predicted_ms"] = timed.plan.after.latency_ms
    # The machine may have changed its pace since layers were timed.
    row["predicted_share"] = row["predicted_ms"] / analysis.timing.dense_ms
    print(json.dumps(row), flush=True)
    row["scores"] = {"dense": case.score(case.model), "factorized": case.score(small.eval())}
    print(row["scores"], flush=True)
    start = time.perf_counter()
    refit(small, case.model, case.data, [entry.name for entry in timed.plan.factorized])
    row["scores"]["refitted"] = case.score(small.eval())
    row["refit_seconds"] = time.perf_counter() - start
    print(row["scores"], flush=True)
    if case.recovery is not None:
        recovery = rankfold.recover(
            small,
            case.recovery,
            teacher=case.model,
            epochs=case.epochs,
            learning_rate=case.learning_rate,
        )
        row["scores"]["recovered"] = case.score(small.eval())
        row["recovery_seconds"] = recovery.seconds
    print(row["scores"], flush=True)
    return row


def analysis_of(name: str, case: Case, reuse: bool) -> tuple[Analysis, float | None]:
    """The analysis and the seconds it took; one that is kept took none."""
    kept = HERE / "cache" / f"{name.replace(' ', '-')}-analysis"
    if reuse and kept.exists():
        return Analysis.load(kept), None
    start = time.perf_counter()
    analysis = rankfold.analyze(case.model, case.data)
    seconds = time.perf_counter() - start
    analysis.save(kept)
    return analysis, seconds


def main(
    only: Annotated[list[str] | None, typer.Option(help="a case; may be repeated")] = None,
    runtime: Runtime = "eager",
    threads: int = 2,
    reuse: bool = False,
    out: Path = HERE / "latency.json",
) -> None:
    torch.set_num_threads(threads)
    facts = json.loads(out.read_text()) if out.exists() else {"cases": {}}
    facts["machine"] = machine()
    for name in only or CASES:
        torch.manual_seed(0)
        facts["cases"][f"{name}, {runtime}"] = run(name, CASES[name](), runtime, reuse)
        save(out, facts)
    write_document(facts)


def write_document(facts: dict[str, Any]) -> None:
    header = ("", "asked", "predicted", "measured", "dense", "small", "MACs kept", "metric")
    on = ", ".join(f"{name} {value}" for name, value in facts["machine"].items())
    table = markdown_table(header, [_row(row) for row in facts["cases"].values()])
    between_markers(DOCUMENT, "latency", f"{table}\nMeasured on: {on}.\n")


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    scores = ", ".join(f"{name} {score:.3f}" for name, score in row["scores"].items())
    return (
        f"{row['case']}, {row['runtime']}",
        f"{row['asked']:.2f}",
        f"{row['predicted_share']:.2f}",
        f"{row['measured_ms'] / row['dense_ms']:.2f}",
        f"{row['dense_ms']:.1f} ms",
        f"{row['measured_ms']:.1f} ms",
        f"{row['macs_kept']:.0%}",
        scores,
    )


if __name__ == "__main__":
    typer.run(main)
