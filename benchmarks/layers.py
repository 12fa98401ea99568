"""Linear layers made of small tensors, beside those of tensorly-torch and torchTT.

Each of 1024 inputs and outputs, with the same modes and ranks: forward in eval mode without
gradients, and forward and backward. The peers' `factorized` and `reconstructed` implementations are
both tried, and the faster one is named. A dense layer and one of low rank, of as many parameters as
the train, stand beside. Times are medians of rounds in which all take turns. Results go to
layers.json and, as a table, to docs/layers.md.
"""

import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from race import between_markers, machine, markdown_table, save
from torch import nn

from rankfold.nn import CPLinear, TensorTrainLinear, TuckerLinear

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchTT says that it has no extension in C++
    from tltorch.factorized_layers import FactorizedLinear
    from torchtt.nn import LinearLayerTT

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "layers.md"
WIDTH, MODES = 1024, (32, 32)
BATCHES = (1, 64, 1024)
TRAIN_RANK, CP_RANK, TUCKER_RANK = 8, 64, 8
LOW_RANK = 8
SECONDS, ROUNDS = 0.03, 7  # at least, of calls in a round


class OfFeatures(nn.Module):
    """torchTT's layer takes inputs that are split into modes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = LinearLayerTT(list(MODES), list(MODES), [1, TRAIN_RANK, 1])

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.layer(tensor.reshape(-1, *MODES)).reshape(-1, WIDTH)


def peer(kind: str, rank: Any, implementation: str) -> nn.Module:
    return FactorizedLinear(
        MODES, MODES, factorization=kind, rank=rank, implementation=implementation
    )


def peers(kind: str, rank: Any) -> dict[str, nn.Module]:
    return {
        f"tensorly-torch, {implementation}": peer(kind, rank, implementation)
        for implementation in ("factorized", "reconstructed")
    }


def races() -> dict[str, dict[str, nn.Module]]:
    """Of each form, rankfold's layer first."""
    low_rank = nn.Sequential(nn.Linear(WIDTH, LOW_RANK, bias=False), nn.Linear(LOW_RANK, WIDTH))
    return {
        f"TT, rank {TRAIN_RANK}": {
            "rankfold": TensorTrainLinear(WIDTH, WIDTH, TRAIN_RANK, MODES, MODES),
            **peers("blocktt", TRAIN_RANK),
            "torchTT": OfFeatures(),
        },
        f"Tucker, rank {TUCKER_RANK}": {
            "rankfold": TuckerLinear(WIDTH, WIDTH, TUCKER_RANK, MODES, MODES),
            **peers("tucker", (TUCKER_RANK,) * 4),
        },
        f"CP, rank {CP_RANK}": {
            "rankfold": CPLinear(WIDTH, WIDTH, CP_RANK, MODES, MODES),
            **peers("cp", CP_RANK),
        },
        "none": {"dense": nn.Linear(WIDTH, WIDTH), f"two factors, rank {LOW_RANK}": low_rank},
    }


def medians(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Milliseconds of each call, all taking turns."""
    counts = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        counts[name] = max(1, round(SECONDS / max(time.perf_counter() - start, 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(counts[name]):
                call()
            times[name].append(1e3 * (time.perf_counter() - start) / counts[name])
    return {name: statistics.median(series) for name, series in times.items()}


def forward(layer: nn.Module, inputs: torch.Tensor) -> Callable[[], Any]:
    def call() -> Any:
        with torch.no_grad():
            return layer(inputs)

    return call


def backward(layer: nn.Module, inputs: torch.Tensor, direction: torch.Tensor) -> Callable[[], Any]:
    given = inputs.clone().requires_grad_()

    def call() -> Any:
        layer.zero_grad()
        layer(given).backward(direction)

    return call


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results, rows = [], []
    for form, layers in races().items():
        parameters = sum(p.numel() for p in next(iter(layers.values())).parameters())
        found: dict[str, list[float]] = {name: [] for name in layers}
        for batch in BATCHES:
            inputs, direction = torch.randn(batch, WIDTH), torch.randn(batch, WIDTH)
            for timed in (
                medians({name: forward(layer.eval(), inputs) for name, layer in layers.items()}),
                medians(
                    {n: backward(layer.train(), inputs, direction) for n, layer in layers.items()}
                ),
            ):
                for name, milliseconds in timed.items():
                    found[name].append(milliseconds)
        for name, times in found.items():
            results.append({"form": form, "layer": name, "milliseconds": times})
            rows.append((form, name, *(f"{one:.3g}" for one in times)))
            form = ""
        print(form, parameters, found, flush=True)
    facts = {"machine": machine(), "batches": BATCHES, "results": results}
    save(HERE / "layers.json", facts)
    columns = (f"{n}, {way}" for n in BATCHES for way in ("forward", "backward"))
    between_markers(DOCUMENT, "layers", markdown_table(("form", "layer", *columns), rows))


if __name__ == "__main__":
    main()
