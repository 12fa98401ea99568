"""Structured layers trained from scratch beside layers of low rank of as many parameters.

Sindhwani, Sainath, Kumar: Structured transforms for small-footprint deep learning. NeurIPS 2015.
Two hidden layers of 512 on Fashion-MNIST (Debian's dataset-fashion-mnist), both structured; the
readout of 10 outputs is dense. Writes benchmarks/sindhwani.json and a table of docs/layers.md.
Networks that are in the file already are not trained again.
"""

import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer
from fashion_mnist import HELD_BACK, read
from race import between_markers, machine, markdown_table, save
from torch import nn

from rankfold.cost import count_parameters
from rankfold.layers import (
    CirculantLinear,
    HankelLinear,
    MonarchLinear,
    ToeplitzLikeLinear,
    ToeplitzLinear,
    square_size,
)

HERE = Path(__file__).parent
RESULTS = HERE / "sindhwani.json"
DOCUMENT = HERE.parent / "docs" / "layers.md"
INPUTS, WIDTH, OUTPUTS = 784, 512, 10
EPOCHS, BATCH = 2, 128
# The better one on images held back is taken, for each kind.
LEARNING_RATES = (1e-3, 4e-3)
SEEDS = (0, 1, 2)

Make = Callable[[int, int], nn.Module]


def low_rank(rank: int) -> Make:
    """The second layer has what rank it takes to have no fewer parameters than Toeplitz-like."""
    sizes = square_size(INPUTS, WIDTH), square_size(WIDTH, WIDTH)
    rest = 2 * sum(sizes) * rank - (INPUTS + WIDTH) * rank

    def make(inputs: int, outputs: int) -> nn.Module:
        width = math.ceil(rest / (2 * WIDTH)) if inputs == WIDTH else rank
        first, last = nn.Linear(inputs, width, bias=False), nn.Linear(width, outputs)
        nn.init.normal_(first.weight, std=inputs**-0.5)
        nn.init.normal_(last.weight, std=(2 / width) ** 0.5)
        nn.init.zeros_(last.bias)
        return nn.Sequential(first, last)

    return make


def dense(inputs: int, outputs: int) -> nn.Module:
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=(2 / inputs) ** 0.5)
    nn.init.zeros_(layer.bias)
    return layer


def structured(kind: Any, *settings: int) -> Make:
    def make(inputs: int, outputs: int) -> nn.Module:
        layer = kind(inputs, outputs, *settings)
        layer.reset_parameters(2**0.5)
        return layer

    return make


RANKS = (1, 2, 4)
KINDS: dict[str, Make] = {
    "dense": dense,
    **{f"Toeplitz-like, r = {rank}": structured(ToeplitzLikeLinear, rank) for rank in RANKS},
    **{f"low rank, r = {rank}": low_rank(rank) for rank in (*RANKS, 8)},
    "circulant": structured(CirculantLinear),
    "Toeplitz": structured(ToeplitzLinear),
    "Hankel": structured(HankelLinear),
    "Monarch, 22 blocks": structured(MonarchLinear, 1, 22),
}


def network(make: Make) -> nn.Sequential:
    hidden = [make(INPUTS, WIDTH), nn.ReLU(), make(WIDTH, WIDTH), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(WIDTH, OUTPUTS))


def trained(kind: str, learning_rate: float, seed: int) -> dict[str, float]:
    """Parameters of the two layers, seconds, and both shares of images right after training."""
    torch.manual_seed(seed)
    model = network(KINDS[kind])
    images, labels = (part[:-HELD_BACK] for part in read("train"))
    mean, deviation = images.mean(), images.std()
    steps = len(images) // BATCH
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=EPOCHS * steps
    )
    start = time.perf_counter()
    for _ in range(EPOCHS):
        for indices in torch.randperm(len(images)).split(BATCH)[:steps]:
            given = (images[indices] - mean) / deviation
            loss = nn.functional.cross_entropy(model(given), labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    seconds = time.perf_counter() - start

    @torch.no_grad()
    def right(part: tuple[torch.Tensor, torch.Tensor]) -> float:
        guesses = model.eval()((part[0] - mean) / deviation).argmax(1)
        return (guesses == part[1]).float().mean().item()

    held_back = tuple(one[-HELD_BACK:] for one in read("train"))
    return {
        "parameters": sum(count_parameters(model[place]) for place in (1, 3)),
        "seconds": seconds,
        "held back": right((held_back[0], held_back[1])),
        "test": right(read("t10k")),
    }


def best_rate(results: dict[str, dict[str, float]], kind: str) -> float | None:
    """By the images held back, the mean over the seeds tried: with one rate some seeds diverge."""
    found: dict[float, list[float]] = {}
    for rate, seed in itertools.product(LEARNING_RATES, SEEDS):
        if (run := results.get(key(kind, rate, seed))) is not None:
            found.setdefault(rate, []).append(run["held back"])
    return max(found, key=lambda rate: statistics.mean(found[rate]), default=None)


def key(kind: str, rate: float, seed: int) -> str:
    return f"{kind} | {rate} | {seed}"


def rows_of(results: dict[str, dict[str, float]]) -> list[tuple[str, ...]]:
    """By ascending parameters."""
    found = []
    for kind in KINDS:
        rate = best_rate(results, kind)
        if rate is not None:
            names = (key(kind, rate, seed) for seed in SEEDS)
            found.append((kind, rate, [results[name] for name in names if name in results]))
    rows = []
    for kind, rate, runs in sorted(found, key=lambda one: one[2][0]["parameters"]):
        tests = [100 * run["test"] for run in runs]
        spread = f" ± {statistics.stdev(tests):.2f}" if len(tests) > 1 else ""
        parameters = f"{runs[0]['parameters']:,.0f}".replace(",", " ")
        made = f"{statistics.mean(tests):.2f}{spread} %"
        rows.append((kind, parameters, made, str(len(tests)), f"{rate:g}"))
    return rows


def main(seconds: float = 1e9, only_write: bool = False) -> None:
    """Train what is missing, for so many seconds, then write the table of what there is."""
    torch.set_num_threads(1)
    results = json.loads(RESULTS.read_text())["networks"] if RESULTS.exists() else {}
    start = time.perf_counter()
    for seed in SEEDS:
        for kind in KINDS:
            rates = LEARNING_RATES if seed == SEEDS[0] else (best_rate(results, kind),)
            for rate in rates:
                is_late = only_write or time.perf_counter() - start > seconds
                if rate is None or is_late or key(kind, rate, seed) in results:
                    continue
                results[key(kind, rate, seed)] = trained(kind, rate, seed)
                print(kind, rate, seed, results[key(kind, rate, seed)], flush=True)
                save(RESULTS, {"machine": machine(), "epochs": EPOCHS, "networks": results})
    header = ("two hidden layers", "parameters of both", "test images right", "seeds", "rate")
    between_markers(DOCUMENT, "sindhwani", markdown_table(header, rows_of(results)))


if __name__ == "__main__":
    typer.run(main)
