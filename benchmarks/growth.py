"""How the time of each decomposition grows with the number of channels, beside its peers."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
import torch
import torchtt
from race import markdown_table, timed
from sklearn.utils.extmath import randomized_svd as sklearn_randomized_svd
from tensorly.decomposition import parafac, partial_tucker

from rankfold.decompose import cp, randomized_svd, tensor_train, tucker

SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
LIMIT = 30.0  # seconds; what would take longer by the growth so far is not run
ROUNDS = 3

Make = Callable[[int], torch.Tensor]
Run = Callable[[torch.Tensor], Any]
Growth = dict[str, dict[str, dict[str, float]]]  # work, who, channels as text, seconds


@dataclass(frozen=True)
class Work:
    make: Make
    product: Run  # the matrix product that it is made of
    runs: dict[str, Run]


def make_kernel(channels: int) -> torch.Tensor:
    """Channels x channels x 3 x 3 whose unfoldings have singular values that fall like a root."""
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(channels, channels, 3, 3, generator=generator)
    scales = torch.arange(1, channels + 1.0) ** -0.5
    return kernel * scales[:, None, None, None] * scales[:, None, None]


def make_matrix(channels: int) -> torch.Tensor:
    """Channels x channels with singular values that fall quickly, and some noise."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, channels, 48, generator=generator)
    noise = torch.randn(channels, channels, generator=generator)
    return left @ right.mT + 1e-3 * noise


def _pairs(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.reshape(8, len(matrix) // 8, 8, len(matrix) // 8)


WORKS = {
    "Tucker-2 of CxCx3x3, ranks C/3": Work(
        make_kernel,
        lambda kernel: kernel.flatten(1) @ kernel.flatten(1).mT,
        {
            "rankfold": lambda kernel: tucker(kernel, [len(kernel) // 3] * 2, (0, 1)),
            "tensorly": lambda kernel: partial_tucker(kernel, [len(kernel) // 3] * 2, modes=[0, 1]),
        },
    ),
    "CP of CxCx3x3, rank 64, 10 iterations": Work(
        make_kernel,
        lambda kernel: kernel.flatten(1).mT @ kernel[:, :64, 0, 0],
        {
            "rankfold": lambda kernel: cp(
                kernel, 64, algorithm="als", iterations=10, improvement=0
            ),
            "tensorly": lambda kernel: parafac(kernel, 64, n_iter_max=10, tol=0),
        },
    ),
    "rank 64 of CxC": Work(
        make_matrix,
        lambda matrix: matrix @ matrix[:, :64],
        {
            "rankfold": lambda matrix: randomized_svd(matrix, 64),
            "sklearn": lambda matrix: sklearn_randomized_svd(matrix.numpy(), 64, random_state=0),
            "torch.linalg.svd": lambda matrix: torch.linalg.svd(matrix, full_matrices=False),
        },
    ),
    "TT of CxC as 8, C/8, 8, C/8, tolerance 0.01": Work(
        make_matrix,
        lambda matrix: matrix @ matrix[:, :64],
        {
            "rankfold": lambda matrix: tensor_train(_pairs(matrix), tolerance=0.01),
            "torchtt": lambda matrix: torchtt.TT(_pairs(matrix), eps=0.01),
        },
    ),
}


def measure_growth() -> Growth:
    return {name: _grow(name, work) for name, work in WORKS.items()}


def _grow(name: str, work: Work) -> dict[str, dict[str, float]]:
    seconds: dict[str, dict[str, float]] = {}
    runs = {**work.runs, "the product": work.product}
    for size in SIZES:
        tensor = work.make(size)
        runs = {who: run for who, run in runs.items() if _expected(seconds.get(who)) < LIMIT}
        times: dict[str, list[float]] = {who: [] for who in runs}
        for turn in range(ROUNDS + 1):
            for who, run in runs.items():
                spent = timed(lambda run=run, tensor=tensor: run(tensor))[0]
                if turn > 0:
                    times[who].append(spent)
        for who, series in times.items():
            seconds.setdefault(who, {})[str(size)] = statistics.median(series)
            print(f"{name} | {who} | {size} | {statistics.median(series):.4g} s", flush=True)
    return seconds


def _expected(so_far: dict[str, float] | None) -> float:
    """Seconds at the next size, were it to grow as it did last."""
    if so_far is None or len(so_far) < 2:
        return 0
    before, last = list(so_far.values())[-2:]
    return last * max(last / before, 1)


def exponent(seconds: dict[str, float]) -> float:
    """The slope of log time over log channels, from 512 channels on, by least squares."""
    points = [(math.log(int(size)), math.log(t)) for size, t in seconds.items() if int(size) >= 512]
    return (
        statistics.linear_regression(*zip(*points, strict=True)).slope if points[1:] else math.nan
    )


def growth_rows(growth: Growth) -> str:
    sizes = [str(size) for size in SIZES]
    rows = []
    for name, series in growth.items():
        for index, (who, seconds) in enumerate(series.items()):
            cells = (f"{seconds[size]:.3g}" if size in seconds else "" for size in sizes)
            slope = exponent(seconds)
            shown = "" if math.isnan(slope) else f"{slope:.2f}"
            rows.append((name if index == 0 else "", who, *cells, shown))
    return markdown_table(("seconds", "by", *sizes, "exponent"), rows)


def draw(growth: Growth, path: Path) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(10, 8), layout="constrained", sharex=True)
    for axis, (name, series) in zip(axes.flat, growth.items(), strict=True):
        for who, seconds in series.items():
            style = {"color": "0.6", "linestyle": "--"} if who == "the product" else {"marker": "o"}
            sizes = [int(size) for size in seconds]
            slope = exponent(seconds)
            label = who if math.isnan(slope) else f"{who}, exponent {slope:.1f}"
            axis.loglog(sizes, list(seconds.values()), label=label, **style)
        axis.set_title(name, fontsize=10)
        axis.set_xticks(SIZES, [str(size) for size in SIZES])
        axis.minorticks_off()
        axis.set_xlabel("channels C")
        axis.set_ylabel("seconds")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    plt.rcParams["svg.hashsalt"] = "rankfold"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
