"""Weights and activations in other precisions, memory formats and kinds of numbers."""

from typing import Any

import torch
from torch import nn

from architectures.architecture import Architecture, batches, images, noise, settled


def convolutional() -> nn.Module:
    network = nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1),
        nn.BatchNorm2d(32),
        nn.ReLU(inplace=True),
        nn.Conv2d(32, 48, 3, padding=1),
        nn.Flatten(),
        nn.Linear(3072, 16),
    )
    return settled(network, torch.randn(16, 3, 16, 16))


def in_dtype(dtype: torch.dtype) -> Any:
    return batches(lambda: torch.randn(4, 3, 16, 16, dtype=dtype))


class PartlyHalf(nn.Module):
    """Layers in bfloat16, the head in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).bfloat16()
        self.head = nn.Linear(64, 32)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(given.bfloat16()).float())


class Autocast(nn.Module):
    """Weights in float32, products in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.body(given)


class Complex(nn.Module):
    """Li et al. 2021: weights of complex numbers between transforms, beside real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.modes = nn.Parameter(torch.randn(32, 32, 6, dtype=torch.cfloat) / 6)
        self.lift, self.local, self.out = nn.Linear(1, 32), nn.Conv1d(32, 32, 1), nn.Linear(32, 1)
        self.mixing = nn.Linear(32, 32, dtype=torch.cfloat)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        hidden = self.lift(given).mT
        spectrum = torch.fft.rfft(hidden)[..., :6]
        mixed = torch.einsum("bim,iom->bom", spectrum, self.modes)
        mixed = self.mixing(mixed.mT).mT
        whole = torch.fft.irfft(mixed, n=hidden.shape[-1])
        return self.out(torch.relu(whole + self.local(hidden)).mT)


ARCHITECTURES = (
    Architecture("float64", lambda: convolutional().double(), in_dtype(torch.float64)),
    Architecture("bfloat16", lambda: convolutional().bfloat16(), in_dtype(torch.bfloat16)),
    Architecture("float16", lambda: convolutional().half(), in_dtype(torch.float16)),
    Architecture(
        "channels_last",
        lambda: convolutional().to(memory_format=torch.channels_last),
        batches(lambda: torch.randn(4, 3, 16, 16).to(memory_format=torch.channels_last)),
    ),
    Architecture("Two precisions in one network", PartlyHalf, noise(8, 64)),
    Architecture("Autocast in the forward", Autocast, noise(8, 64)),
    Architecture("Complex weights beside real ones", Complex, noise(4, 20, 1)),
    Architecture("Inputs of many scales", convolutional, lambda: [1e3 * b for b in images(16)()]),
)
