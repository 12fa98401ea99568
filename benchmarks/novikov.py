"""A TT-layer in place of a wide hidden layer, trained from scratch, on Fashion-MNIST.

As in Novikov et al. 2015, section 6.1 (there of MNIST): a network 784-1024-1024-10, and the same
with the weight of one of its first two layers as a TT-matrix with more than 50 times fewer
parameters. All with the same optimizer, schedule and number of epochs. `--seeds` and `--epochs` set
the length; results go to novikov.json and, as a table, to docs/layers.md.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from fashion_mnist import HELD_BACK, read
from race import between_markers, grouped, machine, markdown_table, mean_of_seeds, save
from torch import nn

from rankfold.nn import TensorTrainLinear

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "layers.md"
WIDTH = 1024
BATCH = 128
RATE = 1e-3


def dense() -> list[nn.Module]:
    return [nn.Linear(784, WIDTH), nn.Linear(WIDTH, WIDTH)]


def train_first() -> list[nn.Module]:
    """Rows and columns of the image are the modes of the inputs."""
    layer = TensorTrainLinear(784, WIDTH, 8, (28, 28), (32, 32))
    layer.reset_parameters(2**0.5)
    return [layer, nn.Linear(WIDTH, WIDTH)]


def train_second() -> list[nn.Module]:
    layer = TensorTrainLinear(WIDTH, WIDTH, 8, 2, 2)
    layer.reset_parameters(2**0.5)
    return [nn.Linear(784, WIDTH), layer]


NETWORKS = {
    "dense": dense,
    "first layer a train of rank 8": train_first,
    "second layer a train of rank 8": train_second,
}


def trained(make: Callable[[], list[nn.Module]], seed: int, epochs: int) -> float:
    """The accuracy on the test images."""
    torch.manual_seed(seed)
    first, second = make()
    model = nn.Sequential(
        nn.Flatten(), first, nn.ReLU(), second, nn.ReLU(), nn.Dropout(0.2), nn.Linear(WIDTH, 10)
    )
    images, labels = (part[:-HELD_BACK] for part in read("train"))
    steps = epochs * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2 * RATE, total_steps=steps)
    for _ in range(epochs):
        for indices in torch.randperm(len(images)).split(BATCH)[: steps // epochs]:
            loss = nn.functional.cross_entropy(model(images[indices]), labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    images, labels = read("t10k")
    model.eval()
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    accuracies: dict[str, list[float]] = {name: [] for name in NETWORKS}
    for seed in range(asked.seeds):
        for name, make in NETWORKS.items():
            accuracies[name].append(trained(make, seed, asked.epochs))
            print(name, seed, accuracies[name][-1], file=sys.stderr, flush=True)
        report(accuracies, asked.epochs)


def report(accuracies: dict[str, list[float]], epochs: int) -> None:
    """Of the seeds that are done."""
    rows, results = [], []
    for name, values in accuracies.items():
        (whole, numbers) = next(map(sizes, filter(is_train, NETWORKS[name]())), (0, 0))
        ratio = ""
        if numbers:
            ratio = f"{grouped(whole)} → {grouped(numbers)}, {whole / numbers:.0f}x fewer"
        rows.append((name, ratio, mean_of_seeds(values), str(len(values))))
        results.append({"network": name, "dense": whole, "train": numbers, "accuracy": values})
    save(HERE / "novikov.json", {"machine": machine(), "epochs": epochs, "results": results})
    header = ("784-1024-1024-10", "weights of that layer", "test accuracy", "seeds")
    between_markers(DOCUMENT, "novikov", markdown_table(header, rows))


def is_train(layer: nn.Module) -> bool:
    return isinstance(layer, TensorTrainLinear)


def sizes(layer: nn.Module) -> tuple[int, int]:
    """Weights of the dense layer, and of the train."""
    assert isinstance(layer, TensorTrainLinear)
    dense_size = layer.in_features * layer.out_features
    return dense_size, sum(factor.numel() for factor in layer.factors)


if __name__ == "__main__":
    main()
