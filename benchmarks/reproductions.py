"""Claims of Jaderberg et al. 2014 and Lebedev et al. 2015 on the network that they are about.

Writes benchmarks/characters.json, and tables and a picture of docs/reproductions.md, in steps:
`fit` makes and scores the networks, `layers` times layers to plan from, `plans` makes and scores
mixtures of methods, `time` measures all networks beside the dense one, by their shapes alone,
`document` writes. What is there already is made again unless --reuse. Network and data are those of
characters.py.

    python benchmarks/reproductions.py
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from characters import accuracy, make_data, make_model, make_test, make_training
from paired import (
    Choices,
    choices_of,
    factorized,
    of_these_shapes,
    paired_times,
    restricted,
    share_of_macs,
)
from race import between_markers, machine, markdown_table, save
from torch import nn

import rankfold
from rankfold.analysis import Analysis, Overrides
from rankfold.distances import SquaredError
from rankfold.errors import BudgetError
from rankfold.methods import DEFAULT_METHODS
from rankfold.refit import refit

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "reproductions.md"
STEPS = ["fit", "layers", "plans", "time", "document"]
LAYERS = ["conv2", "conv3"]  # those that the papers factorize
FINE_TUNING = 200  # batches of 64 to train on
EPOCHS, LEARNING_RATE = 2, 5e-4
BATCH, PICTURE = "32 characters", "a picture of 64x96"
# What is timed: one character, a batch of them, and a picture that is read everywhere.
INPUTS = {
    "one character": (1, 1, 24, 24),
    BATCH: (32, 1, 24, 24),
    PICTURE: (1, 1, 64, 96),
}
SECONDS = 0.7  # of timing each network
LATENCIES = (0.5, 0.35, 0.25, 0.18)  # of a batch
CONTENDERS = {
    "default methods": DEFAULT_METHODS,
    **{name: (name,) for name in ("tucker2", "svd", "separable")},
}


@dataclass(frozen=True)
class Claim:
    """So many times faster with at most so much accuracy lost, after fine-tuning."""

    paper: str
    methods: tuple[str, ...]
    speedup: float
    drop: float

    @property
    def said(self) -> str:
        loss = f"at most {100 * self.drop:g} point lost" if self.drop else "nothing lost"
        return f"{self.speedup}x, {loss}"


PAPERS = (
    Claim("Jaderberg et al., scheme 2 (`separable`)", ("separable",), 2.5, 0.0),
    Claim("Jaderberg et al., scheme 2 (`separable`)", ("separable",), 4.5, 0.01),
    Claim("Lebedev et al. (`cp-separable`, `cp`)", ("cp-separable", "cp"), 8.5, 0.01),
)


def within_shares(method: str, shares: Sequence[float]) -> Iterator[tuple[str, Choices]]:
    """Both layers factorized, the ranks the best ones within these shares of the MACs."""
    forced = Overrides(keep=["conv1", "conv4"], force=dict.fromkeys(LAYERS, method))
    for share in shares:
        plan = analysis().plan(macs=share, overrides=forced)
        yield f"{share:.0%} of MACs", choices_of(plan)


def of_one_rank(method: str, ranks: Sequence[int]) -> Iterator[tuple[str, Choices]]:
    """The same rank for both layers, as Lebedev et al. have it."""
    for rank in ranks:
        yield f"rank {rank}", dict.fromkeys(LAYERS, (method, (rank,)))


CLAIMS: dict[str, Callable[[], Iterable[tuple[str, Choices]]]] = {
    "dense": lambda: [("trained on alike", {})],
    "separable": lambda: chain(
        within_shares("separable", (0.4, 0.25, 0.17, 0.12)),
        # For a whole picture, in which the third layer has the most to do.
        [("ranks 24 and 48", {"conv2": ("separable", (24,)), "conv3": ("separable", (48,))})],
    ),
    "cp-separable": lambda: of_one_rank("cp-separable", (128, 64)),
    "cp": lambda: of_one_rank("cp", (64,)),
    "separable-basis": lambda: of_one_rank("separable-basis", (8,)),
}


@cache
def model() -> nn.Module:
    return make_model()


@cache
def test() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return make_test()


@cache
def analysis() -> Analysis:
    """Of the default methods, which choose the metric of all fits; kept for later runs."""
    kept = HERE / "cache" / "characters-analysis"
    if not kept.exists():
        rankfold.analyze(model(), make_data()).save(kept)
    return Analysis.load(kept)


@cache
def timed_analysis() -> Analysis:
    """With the times of layers; kept for later runs."""
    kept = HERE / "cache" / "characters-timed-analysis"
    if not kept.exists():
        rankfold.with_timings(analysis(), model(), make_data()).save(kept)
    return Analysis.load(kept)


@cache
def fine_tuning() -> list[tuple[torch.Tensor, Any]]:
    """Pictures with what the dense network says of them, and their labels."""
    with torch.no_grad():
        return [
            (images, (model()(images), labels)) for images, labels in make_training()[:FINE_TUNING]
        ]


def loss(output: torch.Tensor, target: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Distillation and labels together."""
    logits, labels = target
    return SquaredError()(output, logits) + nn.functional.cross_entropy(output, labels)


def fit(method: str, label: str, choices: Choices) -> dict[str, Any]:
    start = time.perf_counter()
    small = factorized(model(), analysis(), choices)
    row: dict[str, Any] = {
        "method": method,
        "label": label,
        "choices": choices,
        "fit_seconds": time.perf_counter() - start,
        "macs_kept": {
            name: share_of_macs(model(), small, torch.randn(shape))
            for name, shape in INPUTS.items()
        },
        "scores": {"dense": dense_score(), "factorized": accuracy(small, test())},
    }
    print(json.dumps(row), flush=True)
    found = refit(small, model(), make_data(), list(choices))
    if any(layer.kept for layer in found.layers):
        row["scores"]["refitted"] = accuracy(small, test())
    recovery = rankfold.recover(
        small, fine_tuning(), loss_fn=loss, epochs=EPOCHS, learning_rate=LEARNING_RATE
    )
    row["scores"]["fine-tuned"] = accuracy(small, test())
    row["fine_tuning_seconds"] = recovery.seconds
    print(row["scores"], flush=True)
    return row


@cache
def dense_score() -> float:
    return accuracy(model(), test())


def layer_times(analysis: Analysis) -> dict[str, float]:
    """Milliseconds of a batch in each layer alone, in all else, and in the whole network."""
    assert analysis.timing is not None
    times = {layer.name: layer.timing.dense_ms for layer in analysis.layers if layer.timing}
    return {**times, "all else": analysis.timing.rest_ms, "network": analysis.timing.dense_ms}


def fit_mixtures(name: str) -> Iterator[dict[str, Any]]:
    """Plans at each share of the time that can be reached; nothing is fine-tuned."""
    for share in LATENCIES:
        try:
            plan = restricted(timed_analysis(), CONTENDERS[name]).plan(latency=share)
        except BudgetError as error:
            print(name, error, flush=True)
            continue
        small = rankfold.factorize(model(), plan)
        row = {
            "asked": share,
            "choices": choices_of(plan),
            "scores": {"dense": dense_score(), "factorized": accuracy(small, test())},
        }
        print(name, json.dumps(row), flush=True)
        yield row


def measure_times(choices: Choices, inputs: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Milliseconds, dense and factorized, by input."""
    small = of_these_shapes(model(), choices)
    return {
        name: paired_times(model(), small, torch.randn(INPUTS[name]), SECONDS) for name in inputs
    }


def main(
    step: Annotated[list[str] | None, typer.Option(help=f"{', '.join(STEPS)}; or all")] = None,
    only: Annotated[list[str] | None, typer.Option(help="a method to fit; or all")] = None,
    threads: int = 2,
    reuse: bool = False,
    out: Path = HERE / "characters.json",
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    facts = json.loads(out.read_text()) if out.exists() else {"rows": {}, "mixtures": {}}
    rows, mixtures, steps = facts["rows"], facts["mixtures"], step or STEPS
    if "fit" in steps:
        for method in only or CLAIMS:
            for label, choices in CLAIMS[method]():
                name = f"{method}, {label}"
                if not (reuse and name in rows):
                    rows[name] = fit(method, label, choices)
                    save(out, facts)
    if "layers" in steps:
        facts["layers"] = layer_times(timed_analysis())
        save(out, facts)
    if "plans" in steps:
        for name in CONTENDERS:
            if not (reuse and name in mixtures):
                mixtures[name] = list(fit_mixtures(name))
                save(out, facts)
    if "time" in steps:
        facts["machine"] = machine()
        plans = [row for found in mixtures.values() for row in found]
        for row, inputs in (
            *((r, list(INPUTS)) for r in rows.values()),
            *((r, [BATCH]) for r in plans),
        ):
            if not (reuse and "milliseconds" in row):
                row["milliseconds"] = measure_times(row["choices"], inputs)
                print(row["choices"], row["milliseconds"], flush=True)
                save(out, facts)
    if "document" in steps:
        write_document(facts)


def write_document(facts: dict[str, Any]) -> None:
    on = ", ".join(f"{name} {value}" for name, value in facts["machine"].items())
    timed = [row for row in facts["rows"].values() if "milliseconds" in row]
    rows = sorted(timed, key=lambda row: list(CLAIMS).index(row["method"]))
    mixtures = facts["mixtures"]
    draw(rows, mixtures, DOCUMENT.parent / "reproductions.svg")
    for name, table in {
        "claims": claims_table(rows),
        "layers": layers_table(facts["layers"]),
        "characters": rows_table(rows),
        "mixtures": mixtures_table(mixtures),
    }.items():
        between_markers(DOCUMENT, name, f"{table}\nMeasured on: {on}.\n")


def speedup(row: dict[str, Any], which: str = BATCH) -> float:
    dense, ours = row["milliseconds"][which]
    return dense / ours


def drop(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> float:
    """Of accuracy, after fine-tuning, below the dense network that was trained on alike."""
    return max(rows[0]["scores"].values()) - row["scores"]["fine-tuned"]


def claims_table(rows: Sequence[dict[str, Any]]) -> str:
    """The greatest speed-up with at most the claim's loss, by input."""
    lines = []
    for claim in PAPERS:
        keeping = [
            row for row in rows if row["method"] in claim.methods and drop(row, rows) <= claim.drop
        ]
        cells = []
        for which in INPUTS:
            best = max(keeping, key=lambda row: speedup(row, which), default=None)
            if best is None:
                cells.append("not reached: more is lost by each")
                continue
            found = speedup(best, which)
            verdict = "reached" if found >= claim.speedup else "not reached"
            cells.append(f"**{verdict}**: {found:.1f}x ({best['method']}, {best['label']})")
        lines.append((claim.paper, claim.said, *cells))
    return markdown_table(("paper", "its claim", *INPUTS), lines)


def layers_table(times: dict[str, float]) -> str:
    """Where the dense network's time goes, and what it would take without the papers' layers."""
    left = sum(ms for name, ms in times.items() if name not in (*LAYERS, "network"))
    header = ("", *times, f"all but {' and '.join(LAYERS)}")
    share = f"{left:.1f} ms: {times['network'] / left:.1f}x at most"
    return markdown_table(header, [(BATCH, *(f"{ms:.1f} ms" for ms in times.values()), share)])


def rows_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        (
            f"{row['method']}, {row['label']}",
            f"{row['macs_kept'][BATCH]:.0%}",
            *(f"{speedup(row, which):.1f}x" for which in INPUTS),
            *(
                f"{100 * row['scores'][state]:.1f}" if state in row["scores"] else ""
                for state in ("factorized", "refitted", "fine-tuned")
            ),
            f"{0 - 100 * drop(row, rows):+.1f}",
        )
        for row in rows
    ]
    header = ("", "MACs kept", *INPUTS, "factorized", "refitted", "fine-tuned", "change")
    return markdown_table(header, lines)


def mixtures_table(mixtures: dict[str, list[dict[str, Any]]]) -> str:
    """Speed-up and accuracy of every plan, by what was asked for."""
    lines = []
    for name, rows in mixtures.items():
        found = {row["asked"]: row for row in rows}
        cells = [
            f"{speedup(found[a]):.1f}x / {100 * found[a]['scores']['factorized']:.1f}"
            if a in found
            else ""
            for a in LATENCIES
        ]
        lines.append((name if " " in name else f"`{name}` alone", *cells))
    return markdown_table(
        ("speed-up / accuracy, %", *(f"{a:.0%} of the time" for a in LATENCIES)), lines
    )


def draw(
    rows: Sequence[dict[str, Any]], mixtures: dict[str, list[dict[str, Any]]], path: Path
) -> None:
    """Accuracy against measured speed-up: of the papers' methods, and of mixtures."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    first, second, third = figure.subplots(1, 3)
    for axes, which in ((first, BATCH), (second, PICTURE)):
        for index, method in enumerate(dict.fromkeys(row["method"] for row in rows[1:])):
            found = [row for row in rows if row["method"] == method]
            found.sort(key=lambda row: speedup(row, which))
            for state, style in (("factorized", "o:"), ("fine-tuned", "o-")):
                axes.plot(
                    [speedup(row, which) for row in found],
                    [100 * row["scores"][state] for row in found],
                    style,
                    color=f"C{index}",
                    mfc="white" if state == "factorized" else None,
                    label=f"{method}, {state}",
                )
        axes.set(title=f"{which}, fine-tuned and not")
    for name, plans in mixtures.items():
        third.plot(
            [speedup(row) for row in plans],
            [100 * row["scores"]["factorized"] for row in plans],
            "s-" if " " in name else "o--",
            label=name,
        )
    third.set(title=f"plans by latency, {BATCH}, not fine-tuned")
    for axes in (first, second, third):
        axes.axhline(100 * rows[0]["scores"]["dense"], color="grey", lw=0.8)
        axes.set(xlabel="measured speed-up", ylabel="accuracy, %")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path)


if __name__ == "__main__":
    typer.run(main)
