"""A text recogniser several times as fast on the clock: convolutions, LSTMs and linear layers.

EasyOCR's `english_g2`, one word at a time, planned for a share of its measured time, in eager mode
or in ONNX Runtime, and recovered from its own outputs on rendered words, without labels. In steps,
each from what is kept of the one before: `plan` analyzes, plans by the clock and factorizes;
`recover` trains, and goes on where it was if it was stopped; `further` trains what is recovered on
other words, as often as it is called; `judge` reads words in fonts held out and times dense and
compressed networks in turn, on words of three widths, in both runtimes. Writes
benchmarks/recogniser.json and tables of docs/recogniser.md.
"""

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import where
from race import between_markers, grouped, machine, markdown_table, save
from torch import nn

import rankfold
from rankfold.analysis import Analysis
from rankfold.batches import run
from rankfold.distances import Distance, Divergence, Transcription
from rankfold.measure import in_fastest_memory_format, latencies
from rankfold.runtime import Runtime, caller
from rankfold.search import plan_to_latency

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "examples"))

from ocr_models import make_recogniser
from rendered_text import split_fonts, word_batches
from scene_text import words_right

DOCUMENT = HERE.parent / "docs" / "recogniser.md"
KEPT = HERE / "cache" / "recogniser"
METHODS = ("tucker2", "svd", "separable", "separable3", "full-rank", "fewer-units")
STEPS = ("plan", "recover", "judge")  # and "further"
CALIBRATED_ON = 1000  # words
TESTED_ON = 1000


def calibration() -> list[torch.Tensor]:
    """One word of the middle width first: it is what is timed; then all of them in batches."""
    fonts, _ = split_fonts()
    words = [images for images, _ in word_batches(CALIBRATED_ON, fonts, seed=0)]
    middle = sorted(words, key=lambda images: images.shape[-1])[len(words) // 2]
    return [middle[:1], *words]


def timed_analysis(model: nn.Module, runtime: Runtime) -> Analysis:
    kept = KEPT / ("analysis" if runtime == "eager" else f"analysis-{runtime}")
    if kept.exists():
        return Analysis.load(kept)
    if runtime == "eager":
        analysis = rankfold.analyze(model, calibration(), methods=METHODS, timed=True)
    else:
        analysis = timed_analysis(model, "eager")
        analysis = rankfold.with_timings(analysis, model, calibration(), runtime=runtime)
    analysis.save(kept)
    return analysis


def plan(latency: float, runtime: Runtime) -> dict[str, Any]:
    model = make_recogniser()
    analysis = timed_analysis(model, runtime)
    found = plan_to_latency(
        model,
        analysis,
        latency,
        calibration()[0],
        lambda aim: analysis.plan(latency=aim),
    )
    rankfold.save(found.model, KEPT / f"factorized-{key(latency, runtime)}", force=True)
    return {
        "share": found.share,
        "methods": {e.name: [e.method, e.rank] for e in found.plan.factorized},
        "macs": found.plan.after.macs / found.plan.before.macs,
        "parameters": found.plan.after.parameters / found.plan.before.parameters,
    }


def key(latency: float, runtime: Runtime) -> str:
    return str(latency) if runtime == "eager" else f"{latency} in {runtime}"


def recover(
    row: str,
    earlier: int,
    words: int,
    varied: bool,
    epochs: int,
    learning_rate: float,
    distance: Distance,
) -> dict[str, Any]:
    """After so many earlier recoveries, each on words of its own."""
    start = KEPT / (f"recovered-{row}" if earlier else f"factorized-{row}")
    small = rankfold.load(start, make_recogniser)
    small = small.to(memory_format=torch.channels_last)  # in which both are faster
    teacher = make_recogniser().to(memory_format=torch.channels_last)
    fonts, _ = split_fonts()
    data = [images for images, _ in word_batches(words, fonts, seed=2 + earlier, varied=varied)]
    done = rankfold.recover(
        small,
        data,
        teacher=teacher,
        distance=distance,
        epochs=epochs,
        learning_rate=learning_rate,
        patience=epochs,
        checkpoint=KEPT / f"recovery-{row}-{earlier}.pt",
        progress=Reported(time.perf_counter()),
    )
    rankfold.save(small, KEPT / f"recovered-{row}", force=True)
    return {
        "words": words,
        "varied": varied,
        "epochs": epochs,
        "learning_rate": learning_rate,
        "distance": repr(distance),
        "seconds": done.seconds,
        "scores": [epoch.score for epoch in done.epochs],
        "words right": words_right(small.eval(), tested()),
    }


class Reported:
    """A line now and then."""

    def __init__(self, start: float) -> None:
        self.start = start

    def __call__(self, work: Any, description: str, total: int | None = None) -> Any:
        print(f"{time.perf_counter() - self.start:.0f} s: {description}", flush=True)
        return work


def tested() -> list[tuple[torch.Tensor, list[str]]]:
    """Words in fonts that neither calibration nor recovery sees."""
    return word_batches(TESTED_ON, split_fonts()[1], seed=1)


def judge(row: str) -> dict[str, Any]:
    test = tested()
    model, networks = make_recogniser(), {}
    for stage in ("factorized", "recovered"):
        if (KEPT / f"{stage}-{row}").exists():
            networks[stage] = rankfold.load(KEPT / f"{stage}-{row}", make_recogniser).eval()
    with torch.no_grad():
        found: dict[str, Any] = {"dense": words_right(model, test)}
        found |= {stage: words_right(network, test) for stage, network in networks.items()}
        small = networks["factorized"]
        widths = sorted({images.shape[-1] for images, _ in test})
        chosen = {"short": widths[1], "middle": widths[len(widths) // 2], "long": widths[-2]}
        words = {
            name: next(images[:1] for images, _ in test if images.shape[-1] == width)
            for name, width in chosen.items()
        }
        found["times"] = {name: times(model, small, word, "eager") for name, word in words.items()}
        found["times"]["middle, ONNX Runtime"] = times(model, small, words["middle"], "onnxruntime")
        found["where"] = {
            "dense": where.in_eager_mode(model, words["middle"]),
            "factorized": where.in_eager_mode(small, words["middle"]),
        }
        found["where, ONNX Runtime"] = {
            "dense": where.in_onnx_runtime(model, words["middle"]),
            "factorized": where.in_onnx_runtime(small, words["middle"]),
        }
    return found


def times(dense: nn.Module, small: nn.Module, word: torch.Tensor, runtime: Runtime) -> list[float]:
    """Milliseconds of both in turns, each in the memory format in which it is faster."""
    networks = [in_fastest_memory_format(n, word, runtime=runtime) for n in (dense, small)]
    calls = [caller(network, word, run, runtime) for network in networks]
    return latencies(calls, torch.device("cpu"), seconds=5)


def main(
    latency: Annotated[list[float] | None, typer.Option(help="share of the dense time")] = None,
    step: Annotated[list[str] | None, typer.Option(help="plan, recover, further or judge")] = None,
    runtime: Annotated[Runtime, typer.Option(help="in which plans are timed")] = "eager",
    words: int = 20_000,
    varied: Annotated[bool, typer.Option(help="letters bolder, slanted, stretched")] = False,
    epochs: int = 10,
    learning_rate: float = 1e-3,
    temperature: float = 1.0,
    transcription: Annotated[bool, typer.Option(help="learn what the dense one reads")] = False,
    threads: int = 2,
    out: Path = HERE / "recogniser.json",
) -> None:
    torch.set_num_threads(threads)
    facts = json.loads(out.read_text()) if out.exists() else {"rows": {}}
    facts["machine"] = machine()
    for share in latency or (0.22, 0.16):
        title = key(share, runtime)
        row = facts["rows"].setdefault(title, {})
        for name in step or STEPS:
            if name == "plan":
                row["plan"] = plan(share, runtime)
            elif name in ("recover", "further"):
                before = row.get("recoveries", []) if name == "further" else []
                distance = (Transcription if transcription else Divergence)(temperature=temperature)
                given = (words, varied, epochs, learning_rate, distance)
                row["recoveries"] = [*before, recover(title, len(before), *given)]
            else:
                row["result"] = judge(title)
            print(title, name, json.dumps(row), flush=True)
            save(out, facts)
    write_document(facts)


def write_document(facts: dict[str, Any]) -> None:
    rows = sorted(facts["rows"].items(), reverse=True)
    done = {share: row for share, row in rows if "result" in row}
    if not done:
        return
    dense = next(iter(done.values()))["result"]["dense"]
    columns = (
        "share of time asked for",
        "MACs",
        "parameters",
        *("short word", "middle", "long", "middle, ONNX Runtime"),
        f"words right (dense {dense:.1%})",
        "recovered",
        "minutes",
    )
    on = ", ".join(f"{name} {value}" for name, value in facts["machine"].items())
    tables = [markdown_table(columns, [line(*one) for one in done.items()])]
    tables.append(markdown_table(*recoveries(rows)))
    tables.append(markdown_table(*times_by_kind(done, "where", (*where.KINDS, where.OTHER))))
    kinds = (*where.ONNX_KINDS, where.OTHER, where.BETWEEN)
    known = {share: row for share, row in done.items() if "where, ONNX Runtime" in row["result"]}
    if known:
        tables.append(markdown_table(*times_by_kind(known, "where, ONNX Runtime", kinds)))
    between_markers(DOCUMENT, "recogniser", "\n".join([*tables, f"Measured on: {on}.\n"]))


def line(share: str, row: dict[str, Any]) -> tuple[str, ...]:
    result = row["result"]
    speed = [f"{dense / ours:.1f}x ({ours:.1f} ms)" for dense, ours in result["times"].values()]
    words = [f"{result[s]:.1%}" if s in result else "" for s in ("factorized", "recovered")]
    kept = [f"{row['plan'][key]:.0%}" for key in ("macs", "parameters")]
    seconds = sum(recovery["seconds"] for recovery in row.get("recoveries", []))
    minutes = f"{seconds / 60:.0f}" if seconds else ""
    return share, *kept, *speed, *words, minutes


def recoveries(rows: list[tuple[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """One after the other, each from where the one before ended."""
    header = ("recovery", "words", "passes", "distance", "minutes", "loss held out", "words right")
    lines = [
        (
            f"{share}, {number}" if len(row["recoveries"]) > 1 else share,
            grouped(one["words"]),
            str(one["epochs"]),
            f"`{one['distance']}`",
            f"{one['seconds'] / 60:.0f}",
            f"{-one['scores'][0]:.3f} to {-max(one['scores']):.3f}",
            f"{one['words right']:.1%}",
        )
        for share, row in rows
        for number, one in enumerate(row.get("recoveries", ()), 1)
    ]
    return header, lines


def times_by_kind(
    done: dict[str, Any], key: str, kinds: tuple[str, ...]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Where the time goes: of the dense network, and of each that is factorized."""
    networks = {"dense": next(iter(done.values()))["result"][key]["dense"]}
    networks |= {share: row["result"][key]["factorized"] for share, row in done.items()}
    lines = [(kind, *(f"{one[kind]:.2f}" for one in networks.values())) for kind in kinds]
    total = ("together", *(f"{sum(one.values()):.2f}" for one in networks.values()))
    return ("milliseconds, middle word" + key.removeprefix("where"), *networks), [*lines, total]


if __name__ == "__main__":
    typer.run(main)
