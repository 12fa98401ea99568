"""Weights that are made of others, shared, normalised, kept in lists, or of other kinds."""

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import weight_norm as old_weight_norm

from architectures.architecture import Architecture, batches, images, noise


def perceptron(norm: Any) -> nn.Module:
    return nn.Sequential(
        norm(nn.Linear(48, 96)), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), norm(nn.Linear(96, 48))
    )


class Siamese(nn.Module):
    """Bromley et al. 1994: one network, called twice; the distance of the two embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 48, 3, 2, 1), nn.Flatten()
        )
        self.head = nn.Linear(48 * 16, 32)

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        one, two = (self.head(self.embed(images)) for images in (first, second))
        return functional.pairwise_distance(one, two)


class SharedBlocks(nn.Module):
    """Lan et al. 2020: the same module several times, under several names."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential(nn.Linear(64, 64), nn.Tanh())
        self.blocks = nn.ModuleList([block, block, block])
        self.again = block
        self.out = nn.Linear(64, 32)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            given = given + block(given)
        return self.out(self.again(given))


class TiedAutoencoder(nn.Module):
    """The decoder multiplies with the transpose of the encoder's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(64, 32)
        self.middle = nn.Linear(32, 32)
        self.bias = nn.Parameter(torch.zeros(64))

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.middle(torch.relu(self.encoder(given))))
        return functional.linear(hidden, self.encoder.weight.t(), self.bias)


class TwoTiedLinears(nn.Module):
    """Two linear layers with one parameter and biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 16)
        self.second.weight = self.first.weight

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.second(torch.relu(self.first(given)))))


class Lists(nn.Module):
    """Weights in a ParameterList and a ParameterDict, beside layers."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(48, 48) / 7 for _ in range(2))
        self.named = nn.ParameterDict({"out": torch.randn(48, 8) / 7})
        self.first = nn.Linear(48, 96)
        self.second = nn.Linear(96, 48)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        hidden = self.second(torch.relu(self.first(given)))
        for weight in self.weights:
            hidden = torch.relu(hidden @ weight)
        return hidden @ self.named["out"]


class Buffers(nn.Module):
    """Buffers that are saved, buffers that are not, one of integers, an extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 96), nn.Linear(96, 16)
        self.register_buffer("scale", torch.rand(48))
        self.register_buffer("mask", torch.rand(96) < 0.7, persistent=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("nothing", None)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(given * self.scale)) * self.mask)


class ExtraState(Buffers):
    def get_extra_state(self) -> Any:
        return {"version": 3}

    def set_extra_state(self, state: Any) -> None:
        self.version = state["version"]


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(32, 24), nn.Linear(40, 20)
        self.both = nn.Bilinear(24, 20, 16)

    def forward(self, one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        return self.both(torch.tanh(self.left(one)), torch.tanh(self.right(two)))


class LowRankUpdate(nn.Linear):
    """Hu et al. 2022, by inheritance: a class of the user's, with a forward of its own."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.weight.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(4, inputs) / 10)
        self.up = nn.Parameter(torch.randn(outputs, 4) / 10)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return super().forward(given) + given @ self.down.T @ self.up.T


class Standardised(nn.Conv2d):
    """Qiao et al. 2019: the weight is standardised before every use."""

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return self._conv_forward(given, weight, self.bias)


class Symmetric(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.triu() + weight.triu(1).mT


class ScaledByNorm(nn.Module):
    """A penalty that reads weights in training, and a scale that reads one always."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 96), nn.Linear(96, 48)
        self.out = nn.Linear(48, 16)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.first(given)) / self.second.weight.norm()
        return self.out(self.second(hidden))


class Frozen(nn.Module):
    """A backbone that is not trained, run without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 48)).requires_grad_(
            False
        )
        self.head = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 8))

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            features = self.body(given)
        return self.head(features)


def pruned() -> nn.Module:
    network = perceptron(lambda layer: layer)
    prune.l1_unstructured(network[0], "weight", 0.5)
    return network


def pruned_and_made_permanent() -> nn.Module:
    network = pruned()
    prune.remove(network[0], "weight")
    return network


def symmetric() -> nn.Module:
    network = perceptron(lambda layer: layer)
    parametrize.register_parametrization(network[2], "weight", Symmetric())
    return network


def quantized() -> nn.Module:
    """Linear layers in int8 beside convolutions in float32."""
    network = nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, 2, 1),
        nn.Flatten(),
        nn.Linear(1024, 32),
    )
    return torch.ao.quantization.quantize_dynamic(network, {nn.Linear}, dtype=torch.qint8)


def hooked() -> nn.Module:
    """A layer whose hook doubles what it gives."""
    network = perceptron(lambda layer: layer)
    network[2].register_forward_hook(_doubled)
    return network


def _doubled(module: nn.Module, given: Any, output: torch.Tensor) -> torch.Tensor:
    return 2 * output


def zero() -> nn.Module:
    """A last layer that is zero, as of an adapter before its training."""
    network = perceptron(lambda layer: layer)
    nn.init.zeros_(network[4].weight)
    return network


def expanded() -> nn.Module:
    """A weight of which every row is the same memory: there is one row in it."""
    network = perceptron(lambda layer: layer)
    network[2].weight = nn.Parameter(torch.randn(1, 96).expand(96, 96) / 10)
    return network


def copies() -> nn.Module:
    """One block copied, with all its weights alike but not shared."""
    block = nn.Sequential(nn.Linear(64, 64), nn.Tanh())
    return nn.Sequential(*(copy.deepcopy(block) for _ in range(3)), nn.Linear(64, 16))


ARCHITECTURES = (
    Architecture(
        "Siamese, weights used twice",
        Siamese,
        batches(lambda: ((torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16)),)),
    ),
    Architecture("Blocks shared under several names", SharedBlocks, noise(8, 64)),
    Architecture("Copies of a block", copies, noise(8, 64)),
    Architecture("Decoder of the transposed weight", TiedAutoencoder, noise(8, 64)),
    Architecture("Two linear layers with one weight", TwoTiedLinears, noise(8, 64)),
    Architecture("Weight norm (hook)", lambda: perceptron(old_weight_norm), noise(8, 48)),
    Architecture(
        "Weight norm (parametrization)",
        lambda: perceptron(parametrizations.weight_norm),
        noise(8, 48),
    ),
    Architecture(
        "Orthogonal parametrization",
        lambda: perceptron(parametrizations.orthogonal),
        noise(8, 48),
    ),
    Architecture("Parametrization of the user's", symmetric, noise(8, 48)),
    Architecture("Pruned, masks in place", pruned, noise(8, 48)),
    Architecture("Pruned for good", pruned_and_made_permanent, noise(8, 48)),
    Architecture("Weights in lists and dicts", Lists, noise(8, 48)),
    Architecture("Buffers of every kind", Buffers, noise(8, 48)),
    Architecture("Extra state", ExtraState, noise(8, 48), saved=False),
    Architecture(
        "nn.Bilinear", Bilinear, batches(lambda: ((torch.randn(8, 32), torch.randn(8, 40)),))
    ),
    Architecture(
        "Subclass of Linear",
        lambda: nn.Sequential(LowRankUpdate(64, 96), nn.ReLU(), nn.Linear(96, 64)),
        noise(8, 64),
    ),
    Architecture(
        "Subclass of Conv2d",
        lambda: nn.Sequential(
            Standardised(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.Flatten(), nn.Linear(256, 8)
        ),
        images(6),
    ),
    Architecture("A weight's norm in the forward", ScaledByNorm, noise(8, 48)),
    Architecture("Frozen backbone under no_grad", Frozen, noise(8, 48)),
    Architecture("Hook that changes the output", hooked, noise(8, 48)),
    Architecture("Quantized linear layers", quantized, images(16), saved=False),
    Architecture("A layer of zeros", zero, noise(8, 48)),
    Architecture("A weight of one row, expanded", expanded, noise(8, 48)),
)
