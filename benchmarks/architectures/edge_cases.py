"""The least and the strangest that a network can be."""

import torch
from torch import nn

from architectures.architecture import Architecture, Data, batches, images, noise


class NoLayers(nn.Module):
    """A parameter, but no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(48))

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return given * self.scale


class OwnWeight(nn.Module):
    """A matrix of the network's own, multiplied by hand: no layer that could be replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(48, 48) / 7)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return given @ self.matrix


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.LazyLinear(64), nn.Linear(64, 8)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.first(given)))


class NeverCalled(nn.Module):
    """Most of it is not run."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(48, 64), nn.Linear(64, 256)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return self.used(given)


class Constant(nn.Module):
    """The output does not depend on a layer that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.ignored, self.out = nn.Linear(48, 64), nn.Linear(48, 64)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        self.ignored(given)
        return self.out(given)


class Dots(nn.Module):
    """Names that patterns and paths could stumble over."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("weight", nn.Linear(48, 64))
        self.add_module("layer [0]*", nn.Linear(64, 64))
        self.add_module("größe", nn.Linear(64, 8))

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        for layer in self.children():
            given = layer(given)
        return given


class Dead(nn.Module):
    """A ReLU that gives nothing but zeros: what follows has inputs of zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(48, 64), nn.Linear(64, 64), nn.Linear(64, 8)
        nn.init.constant_(self.first.bias, -100.0)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.second(torch.relu(self.first(given)))))


def not_finite() -> nn.Module:
    network = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 8))
    with torch.no_grad():
        network[0].weight[3, 4] = torch.nan
    return network


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 8))


def sizes() -> Data:
    """Images of a size of their own each, and batches too."""
    return [torch.randn(1 + i % 3, 3, 12 + i, 14) for i in range(6)]


def pooled() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 48, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(48, 10),
    )


def tiny() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))


def one_unit() -> nn.Module:
    return nn.Sequential(
        nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
    )


def big_kernel() -> nn.Module:
    """As large as the picture, of one output channel each; and a Linear of one input."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 16), nn.Flatten(), nn.Linear(64, 1), nn.Linear(1, 64), nn.Linear(64, 4)
    )


def empty_batches() -> Data:
    return [torch.zeros(0, 48)]


ARCHITECTURES = (
    Architecture("One linear layer", lambda: nn.Linear(96, 64), noise(8, 96)),
    Architecture("One convolution", lambda: nn.Conv2d(16, 32, 3), noise(4, 16, 8, 8)),
    Architecture("One embedding", lambda: nn.Embedding(300, 64), lambda: [torch.arange(60)] * 4),
    Architecture("Layers too small to gain", tiny, images(4, 1)),
    Architecture("One input, one output", one_unit, noise(8, 1)),
    Architecture("A kernel as large as the image", big_kernel, images(16)),
    Architecture("Sizes that change", pooled, sizes),
    Architecture("One sample", pooled, lambda: [torch.randn(1, 3, 12, 12)], recovered=True),
    Architecture("Most of it never called", NeverCalled, noise(8, 48)),
    Architecture("A layer without influence", Constant, noise(8, 48)),
    Architecture("Odd names", Dots, noise(8, 48)),
    Architecture("Dead ReLUs", Dead, noise(8, 48)),
    Architecture("Empty Sequential", nn.Sequential, noise(8, 48), refusal="no layer"),
    Architecture("No layers", NoLayers, noise(8, 48), refusal="no layer"),
    Architecture("A matrix of its own", OwnWeight, noise(8, 48)),
    Architecture("Lazy modules", Lazy, noise(8, 48), refusal="run the model once"),
    Architecture("On the meta device", on_meta, noise(8, 48), refusal="meta device"),
    Architecture("NaN among the weights", not_finite, noise(8, 48), refusal="NaN"),
    Architecture("Empty batches", one_unit, empty_batches, refusal="no sample"),
    Architecture("No batches", one_unit, list, refusal="no batch"),
    Architecture(
        "NaN in the data",
        lambda: nn.Linear(96, 64),
        batches(lambda: torch.full((4, 96), torch.nan)),
        refusal="NaN",
    ),
    Architecture(
        "Inputs of the wrong width", lambda: nn.Linear(96, 64), noise(8, 95), refusal="95"
    ),
)
