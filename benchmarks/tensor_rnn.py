"""LSTMs whose matrix of the inputs has 100 times fewer parameters, on sequences of wide frames.

As Ye et al. 2018 and Pan et al. 2019 do on videos, whose frames are wide and which are few: here
each sequence shows a garment of Fashion-MNIST, drawn twice as large somewhere in six frames of
64x64 and moved by up to two pixels from each to the next, under noise; the class is asked for at
the end. 2 000 sequences to train on, 2 000 to test on. An LSTM of 64 units, and the same with the
matrix of all gates as block terms, a tensor ring or a tensor train, whose modes are the halves of
rows and columns; the same optimizer and number of epochs for all, no choice by the test set.
Results go to tensor_rnn.json and, as a table, to docs/layers.md.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from fashion_mnist import read
from race import between_markers, grouped, machine, markdown_table, mean_of_seeds, save
from torch import nn

from rankfold.nn import (
    BlockTermLinear,
    StructuredLinear,
    StructuredRecurrent,
    TensorRingLinear,
    TensorTrainLinear,
)

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "layers.md"
FRAMES, SIDE, NOISE, SAMPLES = 6, 64, 0.5, 2_000
INPUTS = SIDE * SIDE
UNITS, BATCH, RATE = 64, 50, 2e-3

Make = Callable[[int, int], StructuredLinear]
MODES = {"in_modes": (8, 8, 8, 8), "out_modes": (4, 4, 4, 4), "bias": False}
FORMS: dict[str, Make | None] = {
    "LSTM": None,
    "block-term LSTM (4 blocks of rank 6)": lambda i, o: BlockTermLinear(i, o, 4, 6, **MODES),
    "tensor-ring LSTM (rank 8)": lambda i, o: TensorRingLinear(i, o, 8, **MODES),
    "tensor-train LSTM (rank 12)": lambda i, o: TensorTrainLinear(i, o, 12, **MODES),
}


def sequences(part: str, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(samples, frames, 4096) and the labels of the first images of a part."""
    images, labels = (one[:count] for one in read(part))
    images = nn.functional.pad(images.repeat_interleave(2, 2).repeat_interleave(2, 3), (0, 8, 0, 8))
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 9, (count, 1, 2), generator=generator)
    steps = start + torch.randint(-2, 3, (count, FRAMES, 2), generator=generator).cumsum(1)
    rows, columns = ((torch.arange(SIDE) - steps[..., axis, None]) % SIDE for axis in (0, 1))
    samples = torch.arange(count)[:, None, None, None]
    moved = images[:, 0][samples, rows[..., :, None], columns[..., None, :]]
    noise = torch.randn(moved.shape, generator=generator)
    return (moved + NOISE * noise).flatten(2), labels


class Classifier(nn.Module):
    def __init__(self, make: Make | None) -> None:
        super().__init__()
        lstm = nn.LSTM(INPUTS, UNITS, batch_first=True)
        self.recurrent = lstm if make is None else StructuredRecurrent(lstm, make)
        self.readout = nn.Linear(UNITS, 10)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return self.readout(self.recurrent(frames)[0][:, -1])


def trained(make: Make | None, seed: int, epochs: int) -> float:
    """The accuracy on the test sequences."""
    torch.manual_seed(seed)
    model = Classifier(make)
    frames, labels = sequences("train", SAMPLES, seed)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=1e-2)
    steps = epochs * (SAMPLES // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2 * RATE, total_steps=steps)
    for _ in range(epochs):
        for indices in torch.randperm(SAMPLES).split(BATCH):
            loss = nn.functional.cross_entropy(model(frames[indices]), labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    frames, labels = sequences("t10k", SAMPLES, 1_000)
    with torch.no_grad():
        return (model.eval()(frames).argmax(1) == labels).float().mean().item()


def numbers(make: Make | None) -> int:
    """Parameters of the matrix of the inputs."""
    if make is None:
        return INPUTS * 4 * UNITS
    return sum(factor.numel() for factor in make(INPUTS, 4 * UNITS).factors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    accuracies: dict[str, list[float]] = {name: [] for name in FORMS}
    for seed in range(asked.seeds):
        for name, make in FORMS.items():
            accuracies[name].append(trained(make, seed, asked.epochs))
            print(name, seed, accuracies[name][-1], file=sys.stderr, flush=True)
        report(accuracies, asked.epochs)


def report(accuracies: dict[str, list[float]], epochs: int) -> None:
    """Of the seeds that are done."""
    rows, results = [], []
    whole = numbers(None)
    for name, values in accuracies.items():
        count = numbers(FORMS[name])
        fewer = f"{whole / count:.0f}x" if count < whole else ""
        rows.append((name, grouped(count), fewer, mean_of_seeds(values), str(len(values))))
        results.append({"network": name, "parameters": count, "accuracy": values})
    save(HERE / "tensor_rnn.json", {"machine": machine(), "epochs": epochs, "results": results})
    header = ("4 096 inputs, 64 units", "input weights", "fewer", "test accuracy", "seeds")
    between_markers(DOCUMENT, "tensor rnn", markdown_table(header, rows))


if __name__ == "__main__":
    main()
