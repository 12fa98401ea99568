"""How long the product of a Toeplitz-like layer takes, beside the dense and the low-rank one.

Writes benchmarks/toeplitz.json, docs/toeplitz.svg and a table of docs/layers.md.
"""

import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
import torch
import typer
from race import between_markers, machine, markdown_table, save
from torch import nn

from rankfold.layers import ToeplitzLikeLinear

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "layers.md"
SIZES = tuple(64 << power for power in range(9))
RANKS, BATCHES = (1, 2, 4), (1, 64)
LEAST = 1024  # the sizes from which on a slope is fitted
ROUNDS, SECONDS = 5, 0.02  # of each product: so many turns, each so long at least

Times = dict[str, dict[str, float]]  # by name, by size as text: milliseconds


def layers(size: int) -> dict[str, nn.Module]:
    """Of equal parameters at equal ranks: 2 size rank."""
    made: dict[str, nn.Module] = {"dense": nn.Linear(size, size, bias=False)}
    for rank in RANKS:
        layer = ToeplitzLikeLinear(size, size, rank, bias=False).eval()
        layer.keep_spectra(True)
        made[f"Toeplitz-like, rank {rank}"] = layer
        factors = nn.Linear(size, rank, bias=False), nn.Linear(rank, size, bias=False)
        made[f"low rank, rank {rank}"] = nn.Sequential(*factors)
    return made


@torch.no_grad()
def measure(batch: int) -> Times:
    """Medians of turns that all products of a size take."""
    found: Times = {}
    for size in SIZES:
        rows = torch.randn(batch, size)
        made = layers(size)
        turns: dict[str, list[float]] = {name: [] for name in made}
        for _ in range(ROUNDS):
            for name, layer in made.items():
                turns[name].append(_seconds(lambda layer=layer, rows=rows: layer(rows)))
        for name, series in turns.items():
            found.setdefault(name, {})[str(size)] = 1e3 * statistics.median(series)
        print(batch, size, {name: round(found[name][str(size)], 4) for name in made}, flush=True)
    return found


def _seconds(call: Callable[[], object]) -> float:
    call()
    start, count = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < SECONDS or count == 0:
        call()
        count += 1
    return spent / count


def slope(series: dict[str, float]) -> float:
    """Of log time over log size, by least squares."""
    points = [(math.log(int(n)), math.log(t)) for n, t in series.items() if int(n) >= LEAST]
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def crossover(series: dict[str, float], dense: dict[str, float]) -> float | None:
    """The size from which on the series is below the dense one, between two by their logarithms."""
    gaps = [(math.log(int(n)), math.log(t / dense[n])) for n, t in series.items()]
    above = [index for index, (_, gap) in enumerate(gaps) if gap >= 0]
    if not above:
        return float(SIZES[0])
    if above[-1] == len(gaps) - 1:
        return None
    (left, high), (right, low) = gaps[above[-1] : above[-1] + 2]
    return math.exp(left + (right - left) * high / (high - low))


def rows_of(times: dict[str, Times]) -> list[tuple[str, ...]]:
    rows = []
    for batch, series in times.items():
        for name, one in series.items():
            where = ""
            if name != "dense":
                found = crossover(one, series["dense"])
                where = "none" if found is None else f"{found:.0f}"
                where = f"below {SIZES[0]}" if found == SIZES[0] else where
            cells = (f"{one[str(n)]:.3g}" for n in SIZES)
            rows.append((batch, name, *cells, f"{slope(one):.2f}", where))
    return rows


def draw(times: dict[str, Times], path: Path) -> None:
    figure, axes = plt.subplots(1, len(times), figsize=(11, 5), layout="constrained", sharey=True)
    for axis, (batch, series) in zip(axes, times.items(), strict=True):
        for name, one in series.items():
            kind, _, rank = name.partition(", rank ")
            style = {"dense": "-", "Toeplitz-like": "-", "low rank": ":"}[kind]
            color = "0.2" if kind == "dense" else f"C{RANKS.index(int(rank))}"
            label = f"{name}: slope {slope(one):.2f}"
            sizes = [int(n) for n in one]
            axis.loglog(sizes, list(one.values()), style, marker=".", color=color, label=label)
        axis.set_title(f"batch {batch}", fontsize=10)
        axis.set_xticks(SIZES, [str(size) for size in SIZES], fontsize=8)
        axis.minorticks_off()
        axis.set_xlabel("inputs and outputs n")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    axes[0].set_ylabel("milliseconds")
    plt.rcParams["svg.hashsalt"] = "rankfold"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main(only_draw: bool = False) -> None:
    torch.set_num_threads(1)
    path = HERE / "toeplitz.json"
    if not only_draw:
        times = {str(batch): measure(batch) for batch in BATCHES}
        save(path, {"machine": machine(), "milliseconds": times})
    times = json.loads(path.read_text())["milliseconds"]
    draw(times, DOCUMENT.parent / "toeplitz.svg")
    sizes = [str(size) for size in SIZES]
    header = ("batch", "milliseconds, n =", *sizes, "slope", "below dense from n =")
    between_markers(DOCUMENT, "toeplitz", markdown_table(header, rows_of(times)))


if __name__ == "__main__":
    typer.run(main)
