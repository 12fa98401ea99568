"""A network of six 3x3 convolutions, trained on Fashion-MNIST once and kept for later runs.

Debian's package dataset-fashion-mnist has the data. `make_model`, `make_data`, `make_test` and
`accuracy` are what the command line takes: fashion_mnist:make_model.
"""

import gzip
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rankfold.measure import accuracy

SOURCE = Path("/usr/share/datasets/fashion-mnist")
WEIGHTS = Path(__file__).parent / "cache" / "six_convolutions.safetensors"
EPOCHS = 3
HELD_BACK = 5_000  # training images kept out of training, to calibrate on

__all__ = ["accuracy", "make_data", "make_model", "make_test"]


def six_convolutions() -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 1
    for index, width in enumerate((32, 32, 64, 64, 128, 128)):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
        layers.append(nn.ReLU(inplace=True))
        if index % 2 == 1:
            layers.append(nn.MaxPool2d(2))
        channels = width
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(128 * 9, 256), nn.ReLU(), nn.Linear(256, 10)
    )


def make_model() -> nn.Module:
    model = six_convolutions()
    if not WEIGHTS.exists():
        WEIGHTS.parent.mkdir(exist_ok=True)
        train(model)
        save_file(model.state_dict(), WEIGHTS)
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


def train(model: nn.Module) -> None:
    torch.manual_seed(0)
    images, labels = (part[:-HELD_BACK] for part in read("train"))
    steps = EPOCHS * (len(images) // 128)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    model.train()
    for epoch in range(EPOCHS):
        for indices in torch.randperm(len(images)).split(128)[: steps // EPOCHS]:
            loss = nn.functional.cross_entropy(model(images[indices]), labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1} of {EPOCHS}: loss {loss:.3f}", flush=True)


def make_data() -> list[torch.Tensor]:
    """Images that were not trained on, without their labels, in batches of 64."""
    return list(read("train")[0][-HELD_BACK:].split(64))


def make_test() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """All 10 000 test images with their labels."""
    images, labels = read("t10k")
    return list(zip(images.split(250), labels.split(250), strict=True))


@cache
def read(part: str) -> tuple[torch.Tensor, torch.Tensor]:
    images = _read_idx(SOURCE / f"{part}-images-idx3-ubyte.gz")
    labels = _read_idx(SOURCE / f"{part}-labels-idx1-ubyte.gz")
    return torch.from_numpy(images)[:, None].float() / 255, torch.from_numpy(labels).long()


def _read_idx(path: Path) -> np.ndarray:
    """One idx-gz file of unsigned bytes (the MNIST format)."""
    raw = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(raw, ">u4", raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape).copy()
