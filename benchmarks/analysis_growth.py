"""How the time of an analysis grows with layers and with calibration data.

Writes benchmarks/analysis_growth.json and a table of docs/planning.md. The network is a stack of
equal 3x3 convolutions, so that twice the layers are twice the work in everything that the analysis
has to do: passes through the network, decompositions, candidates, checks.
"""

import statistics
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
LAYERS = (4, 8, 16, 32, 64, 128)
BATCHES = (4, 8, 16, 32, 64, 128)
SAME_LAYERS, SAME_BATCHES = 8, 8  # what stays while the other grows


def network(layers: int) -> nn.Module:
    torch.manual_seed(0)
    stack: list[nn.Module] = [nn.Conv2d(3, CHANNELS, 3, padding=1)]
    for _ in range(layers - 1):
        stack += [nn.ReLU(), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)]
    return nn.Sequential(*stack)


def seconds(layers: int, batches: int, rounds: int) -> float:
    """The median of some rounds."""
    model = network(layers)
    data = [torch.randn(SAMPLES, 3, SIDE, SIDE) for _ in range(batches + 1)]
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        rankfold.analyze(model, data, batches=batches, held_out=1)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def series(
    sizes: tuple[int, ...], measure: Callable[[int], float], what: str
) -> list[dict[str, Any]]:
    rows = []
    for size in sizes:
        rows.append({what: size, "seconds": measure(size)})
        print(rows[-1], flush=True)
    return rows


def main(
    threads: int = 2,
    rounds: int = 3,
    out: Annotated[Path, typer.Option()] = HERE / "analysis_growth.json",
) -> None:
    torch.set_num_threads(threads)
    seconds(4, 4, 1)
    facts = {
        "machine": machine(),
        "layers": series(LAYERS, lambda n: seconds(n, SAME_BATCHES, rounds), "layers"),
        "batches": series(BATCHES, lambda n: seconds(SAME_LAYERS, n, rounds), "batches"),
    }
    save(out, facts)
    lines = []
    for what in ("layers", "batches"):
        rows = facts[what]
        lines += [
            (what, *(str(row[what]) for row in rows)),
            ("seconds", *(f"{row['seconds']:.1f}" for row in rows)),
        ]
    table = markdown_table(("", *("" for _ in LAYERS)), lines)
    on = ", ".join(f"{name} {value}" for name, value in facts["machine"].items())
    between_markers(DOCUMENT, "growth", f"{table}\nMeasured on: {on}.\n")


if __name__ == "__main__":
    typer.run(main)
