"""How long analyses take: of two pretrained networks, and as layers and calibration data grow.

Writes benchmarks/analysis_time.json and the tables of docs/planning.md. The network that grows is a
stack of equal 3x3 convolutions, so that twice the layers are twice the work in everything that the
analysis has to do: passes through the network, decompositions, candidates, checks.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from planning import DOCUMENT
from race import between_markers, machine, markdown_table, save
from torch import nn

import rankfold

HERE = Path(__file__).parent
CHANNELS, SIDE, SAMPLES = 48, 16, 8
SIZES = (4, 8, 16, 32, 64)
SAME = 8  # layers or batches that stay while the others grow
SHARES = (0.7, 0.6, 0.5)  # of the MACs, that plans are made for


def craft() -> tuple[nn.Module, list[Any]]:
    """64 pages of 256x320, two in a batch."""
    sys.path.append(str(HERE.parent / "examples"))
    from ocr_models import make_detector
    from rendered_text import page_batches, split_fonts

    return make_detector(), page_batches(64, split_fonts()[0], seed=0)


def minilm() -> tuple[nn.Module, list[Any]]:
    """256 sentences, 16 in a batch."""
    import minilm

    return minilm.make_model(), minilm.make_data()[:16]


def of_network(make: Callable[[], tuple[nn.Module, list[Any]]]) -> dict[str, Any]:
    """Seconds of an analysis of all the data, an eighth of it held out, and of plans after it."""
    model, data = make()
    held_out = len(data) // 8
    start = time.perf_counter()
    analysis = rankfold.analyze(model, data, batches=len(data) - held_out, held_out=held_out)
    row: dict[str, Any] = {"analyze_seconds": time.perf_counter() - start, "plan_seconds": []}
    for share in SHARES:
        start = time.perf_counter()
        analysis.plan(macs=share)
        row["plan_seconds"].append(time.perf_counter() - start)
    print(row, flush=True)
    return row


def of_stack(layers: int, batches: int, rounds: int) -> float:
    """The median seconds of some analyses of a stack of convolutions."""
    torch.manual_seed(0)
    stack: list[nn.Module] = [nn.Conv2d(3, CHANNELS, 3, padding=1)]
    for _ in range(layers - 1):
        stack += [nn.ReLU(), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)]
    model = nn.Sequential(*stack)
    data = [torch.randn(SAMPLES, 3, SIDE, SIDE) for _ in range(batches + 1)]
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        rankfold.analyze(model, data, batches=batches, held_out=1)
        found.append(time.perf_counter() - start)
    print(layers, batches, found, flush=True)
    return statistics.median(found)


NETWORKS = {"MiniLM": minilm, "CRAFT": craft}
PARTS = [*NETWORKS, "layers", "batches"]


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"{', '.join(PARTS)}; or all")] = None,
    threads: int = 2,
    rounds: int = 3,
    out: Path = HERE / "analysis_time.json",
) -> None:
    """Parts that are not run keep their results."""
    torch.set_num_threads(threads)
    of_stack(4, 4, 1)  # to warm up
    facts = json.loads(out.read_text()) if out.exists() else {"networks": {}}
    facts |= {"machine": machine(), "rounds": rounds}
    for part in only or PARTS:
        if part in NETWORKS:
            facts["networks"][part] = of_network(NETWORKS[part])
        elif part == "layers":
            facts[part] = [of_stack(size, SAME, rounds) for size in SIZES]
        else:
            facts[part] = [of_stack(SAME, size, rounds) for size in SIZES]
        save(out, facts)
    write_document(facts)


def write_document(facts: dict[str, Any]) -> None:
    on = ", ".join(f"{name} {value}" for name, value in facts["machine"].items())
    networks = markdown_table(
        ("", "analysis", "the slowest plan after it"),
        [
            (name, f"{row['analyze_seconds']:.0f} s", f"{max(row['plan_seconds']):.2f} s")
            for name, row in facts["networks"].items()
        ],
    )
    growth = markdown_table(
        ("seconds", *(str(size) for size in SIZES)),
        [
            (f"{what}, {SAME} {other}", *(f"{seconds:.1f}" for seconds in facts[what]))
            for what, other in (("layers", "batches"), ("batches", "layers"))
        ],
    )
    between_markers(DOCUMENT, "analysis-time", networks)
    between_markers(
        DOCUMENT, "growth", f"{growth}\nMedians of {facts['rounds']}. Measured on: {on}.\n"
    )


if __name__ == "__main__":
    typer.run(main)
