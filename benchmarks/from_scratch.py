"""Networks of low rank trained from scratch, and ranks learned, beside the usual way.

The demo's architecture (rankfold.demo.network) on all 60 000 training images of Fashion-MNIST
(Debian's dataset-fashion-mnist), all trained with the same schedule, on labels:

- at a third of the MACs, layer by layer: separable with and without a batch norm between the
  factors, and two factors, from scratch (Tai et al. 2016); two factors with initial values drawn at
  random, from the SVD of random weights (Khodak et al. 2021) and from the trained network (Kim et
  al. 2016), all trained alike;
- at a sixth of the MACs, from the trained network in as many steps: factorized and recovered, in
  three steps (`training.gradually`), with learned ranks (`training.learn_ranks`).

Writes benchmarks/from_scratch.json and the tables of docs/training.md. What is in the file already
is not done again. A GPU is used where there is one.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Annotated

import torch
import typer
from fashion_mnist import read
from paired import factorized
from race import between_markers, machine, markdown_table, mean_of_seeds, save
from safetensors.torch import load_file, save_file
from torch import nn

import rankfold
from rankfold import training
from rankfold.cost import count_macs, count_parameters
from rankfold.demo.network import SmallVGG
from rankfold.nn import LowRankConv2d, SeparableConv2d
from rankfold.recover import Precision
from rankfold.replacement import put_in_place

HERE = Path(__file__).parent
RESULTS = HERE / "from_scratch.json"
DOCUMENT = HERE.parent / "docs" / "training.md"
BATCH = 256
EPOCHS, RATE = 15, 2e-3  # of training from scratch
SHIFT = 2  # places at most by which an image is moved in training
PRECISION: Precision = "bfloat16"  # of forward passes in training; weights are float32
SEEDS = (0, 1, 2)
THIRD = 1 / 3  # of each convolution's MACs
DEEP = 1 / 6  # of the network's MACs
DEEP_EPOCHS, DEEP_RATE = 12, 1e-3
STEPS = 3  # of cutting ranks gradually
ROUNDS = 8  # of LC, an epoch of the dense network each
METHODS = ("svd", "separable", "tucker2")

Labelled = list[tuple[torch.Tensor, torch.Tensor]]


@cache
def device() -> torch.device:
    """Where networks are trained."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Training:
    """So many images in an order that is new each time, moved a little, half of them mirrored."""

    def __init__(self, count: int | None = None) -> None:
        self.images, self.labels = (part[:count].to(device()) for part in read("train"))

    def __len__(self) -> int:
        return math.ceil(len(self.images) / BATCH)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for chosen in torch.randperm(len(self.images)).to(device()).split(BATCH):
            yield self.moved(self.images[chosen]), self.labels[chosen]

    def moved(self, images: torch.Tensor) -> torch.Tensor:
        count, size = len(images), images.shape[-1]
        padded = nn.functional.pad(images, 4 * [SHIFT])
        places = [torch.randint(2 * SHIFT + 1, (count, 1)) + torch.arange(size) for _ in range(2)]
        rows, columns = (each.to(images.device) for each in places)
        mirrored = (torch.rand(count, 1) < 0.5).to(images.device)
        columns = torch.where(mirrored, columns.flip(1), columns)
        index = torch.arange(count, device=images.device)[:, None, None]
        return padded[index, 0, rows[:, :, None], columns[:, None]][:, None]


@cache
def make_training() -> Training:
    return Training()


def calibration(data: Training) -> list[torch.Tensor]:
    """Some of the images as they are, without labels."""
    return list(data.images[:5_000].split(BATCH))


@cache
def make_test() -> Labelled:
    images, labels = read("t10k")
    return list(zip(images.split(250), labels.split(250), strict=True))


def train(
    model: nn.Module, data: Training, seed: int, epochs: int = EPOCHS, rate: float = RATE
) -> rankfold.Recovery:
    return rankfold.recover(
        model.to(memory_format=torch.channels_last),
        data,
        loss_fn=nn.functional.cross_entropy,
        epochs=epochs,
        learning_rate=rate,
        precision=PRECISION,
        seed=1000 * seed,
    )


def convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    """All but the first, whose single input channel leaves nothing to save."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    return {name: layer for name, layer in found.items() if layer.in_channels > 1}


def separable_rank(layer: nn.Conv2d) -> int:
    """At which kx1 and 1xk take a third of the layer's MACs."""
    inputs, outputs = layer.in_channels, layer.out_channels
    return round(THIRD * 3 * inputs * outputs / (inputs + outputs))


def two_factor_rank(layer: nn.Conv2d) -> int:
    """At which kxk to the rank and 1x1 from it take a third of the layer's MACs."""
    inputs, outputs = layer.in_channels, layer.out_channels
    return round(THIRD * 9 * inputs * outputs / (9 * inputs + outputs))


def dense(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return SmallVGG().to(device())


def from_scratch(make: Callable[[nn.Conv2d], nn.Module]) -> Callable[[int], nn.Module]:
    def network(seed: int) -> nn.Module:
        model = dense(seed)
        layers = convolutions(model).values()
        return put_in_place(model, {layer: make(layer) for layer in layers})

    return network


def separable(batch_norm: bool) -> Callable[[int], nn.Module]:
    def make(layer: nn.Conv2d) -> nn.Module:
        sizes = layer.in_channels, layer.out_channels, 3, separable_rank(layer)
        form = SeparableConv2d(*sizes, padding=1, bias=False, batch_norm=batch_norm)
        form.reset_parameters(2**0.5)
        return form.to(device())

    return from_scratch(make)


def two_factors(batch_norm: bool) -> Callable[[int], nn.Module]:
    def make(layer: nn.Conv2d) -> nn.Module:
        sizes = layer.in_channels, layer.out_channels, 3, two_factor_rank(layer)
        form = LowRankConv2d(*sizes, padding=1, bias=False, batch_norm=batch_norm)
        form.reset_parameters(2**0.5)
        return form.to(device())

    return from_scratch(make)


def in_two_factors(model: nn.Module) -> nn.Module:
    """The ranks of `two_factors`, from the SVD of the weights that there are."""
    ranks = {name: two_factor_rank(layer) for name, layer in convolutions(model).items()}
    analysis = rankfold.analyze(model, calibration(make_training()), metric="weight", batches=1)
    return factorized(model, analysis, {name: ("svd", (rank,)) for name, rank in ranks.items()})


def trained_dense(seed: int) -> nn.Module:
    """Trained once and kept."""
    path = HERE / "cache" / f"from_scratch-{seed}.safetensors"
    model = dense(seed)
    if not path.exists():
        train(model, make_training(), seed)
        path.parent.mkdir(exist_ok=True)
        save_file({n: t.contiguous() for n, t in model.state_dict().items()}, path)
    model.load_state_dict(load_file(path))
    return model.to(memory_format=torch.channels_last).eval()


def trained(make: Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
    def network(seed: int) -> nn.Module:
        model = make(seed)
        train(model, make_training(), seed)
        return model

    return network


def recovered(model: nn.Module, data: Training, seed: int) -> nn.Module:
    """Factorized at once, then trained."""
    analysis = rankfold.analyze(model, calibration(data), methods=METHODS)
    small = rankfold.factorize(model, analysis.plan(macs=DEEP))
    train(small, data, seed, DEEP_EPOCHS, DEEP_RATE)
    return small


def step_by_step(model: nn.Module, data: Training, seed: int) -> nn.Module:
    return training.gradually(
        model,
        data,
        macs=DEEP,
        steps=STEPS,
        methods=METHODS,
        loss_fn=nn.functional.cross_entropy,
        epochs=DEEP_EPOCHS // STEPS,
        learning_rate=DEEP_RATE,
        precision=PRECISION,
        seed=1000 * seed,
    )


def learned(loss_metric: str) -> Callable[[nn.Module, Training, int], nn.Module]:
    """Two thirds of the epochs on the dense network, the others on the factorized one."""

    def network(model: nn.Module, data: Training, seed: int) -> nn.Module:
        found = training.learn_ranks(
            model,
            data,
            macs=DEEP,
            loss_fn=nn.functional.cross_entropy,
            rounds=ROUNDS,
            growth=2.0,
            methods=METHODS,
            loss_metric=loss_metric,
            learning_rate=DEEP_RATE,
            precision=PRECISION,
            seed=1000 * seed,
        )
        train(found.model, data, seed, DEEP_EPOCHS - ROUNDS, DEEP_RATE)
        return found.model

    return network


SCRATCH = {
    "dense": trained_dense,
    "separable, batch norm between": trained(separable(True)),
    "separable": trained(separable(False)),
    "two factors, batch norm between": trained(two_factors(True)),
    "two factors": trained(two_factors(False)),
    "two factors, from the SVD of random weights": trained(lambda s: in_two_factors(dense(s))),
    "two factors, from the trained network": trained(lambda s: in_two_factors(trained_dense(s))),
}
FROM_TRAINED = {
    "factorized, recovered": recovered,
    "in three steps": step_by_step,
    "learned ranks (LC)": learned("weight"),
    "learned ranks (LC), metric chosen": learned("auto"),
}


def every_way() -> dict[str, Callable[[int], nn.Module]]:
    """A network of a seed, by each of them."""
    deep = {
        name: lambda seed, make=make: make(trained_dense(seed), make_training(), seed)
        for name, make in FROM_TRAINED.items()
    }
    return SCRATCH | deep


def measured(small: nn.Module) -> dict[str, float]:
    small.eval()
    return {
        "accuracy": rankfold.accuracy(small, make_test()),
        "macs": count_macs(lambda: small(make_test()[0][0][:1].to(device()))),
        "parameters": count_parameters(small),
    }


def key(name: str, seed: int) -> str:
    return f"{name} | {seed}"


def table(results: dict[str, dict[str, float]], names: list[str]) -> str:
    rows = []
    for name in names:
        runs = [results[key(name, seed)] for seed in SEEDS if key(name, seed) in results]
        if runs:
            accuracies = [run["accuracy"] for run in runs]
            macs, parameters = (runs[0][what] / 1e6 for what in ("macs", "parameters"))
            row = (name, f"{macs:.1f} M", f"{parameters:.2f} M", mean_of_seeds(accuracies))
            rows.append((*row, str(len(runs))))
    return markdown_table(("network", "MACs", "parameters", "test accuracy", "seeds"), rows)


def main(
    seconds: float = 1e9,
    only_write: bool = False,
    seed: Annotated[list[int] | None, typer.Option(help="of these alone")] = None,
    out: Path = RESULTS,
) -> None:
    """Do what is missing, for so many seconds, then write the tables of what there is."""
    results = json.loads(out.read_text())["networks"] if out.exists() else {}
    start = time.perf_counter()
    for one in seed or SEEDS:
        for name, make in every_way().items():
            late = only_write or time.perf_counter() - start > seconds
            if late or key(name, one) in results:
                continue
            results[key(name, one)] = measured(make(one))
            print(name, one, results[key(name, one)], flush=True)
            save(out, {"machine": machine(), "networks": results})
    between_markers(DOCUMENT, "from scratch", table(results, list(SCRATCH)))
    deep = table(results, ["dense", *FROM_TRAINED])
    between_markers(DOCUMENT, "from the trained network", deep)


if __name__ == "__main__":
    typer.run(main)
