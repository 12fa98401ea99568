"""Forward passes of odd signatures and control flow, and odd inputs and outputs."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from architectures.architecture import Architecture, batches, noise


class Branching(nn.Module):
    """Which layers run depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(48, 64)
        self.calm, self.wild = nn.Linear(64, 64), nn.Linear(64, 64)
        self.never, self.out = nn.Linear(64, 64), nn.Linear(64, 8)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.stem(given))
        for _ in range(1 + int(hidden.sum()) % 3):
            hidden = torch.tanh(self.calm(hidden))
        hidden = self.wild(hidden) if hidden[0, 0] > 0 else hidden
        return self.out(hidden if hidden.isfinite().all() else self.never(hidden))


class EarlyExit(nn.Module):
    """As many outputs as it took layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(48, 48) for _ in range(3))
        self.exits = nn.ModuleList(nn.Linear(48, 5) for _ in range(3))

    def forward(self, given: torch.Tensor) -> list[torch.Tensor]:
        outputs = []
        for layer, way_out in zip(self.layers, self.exits, strict=True):
            given = torch.relu(layer(given))
            outputs.append(way_out(given))
        return outputs


class Keywords(nn.Module):
    """Only keywords, some optional, some not tensors, and others that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(32, 64), nn.Linear(24, 64)
        self.out = nn.Linear(64, 16)

    def forward(
        self, *, left: torch.Tensor, right: torch.Tensor | None = None, mode: str = "a", **more: Any
    ) -> dict[str, Any]:
        hidden = self.left(input=left)  # a layer called by keyword
        if right is not None and mode == "sum":
            hidden = hidden + self.right(right) * more.get("weight", 1.0)
        return {"logits": self.out(torch.relu(hidden)), "mode": mode, "loss": None}


class Nested(nn.Module):
    """Positional arguments that are dicts and lists, of which one is changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"a": nn.Linear(24, 48), "b": nn.Linear(32, 48)})
        self.out = nn.Linear(48, 12)

    def forward(self, features: dict[str, torch.Tensor], weights: list[float]) -> torch.Tensor:
        rows = [w * self.layers[k](features[k]) for k, w in zip("ab", weights, strict=True)]
        return self.out(torch.relu(sum(rows)))


class InPlace(nn.Module):
    """Writes into its input, its activations and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(48, 64), nn.Linear(64, 64), nn.Linear(64, 8)
        self.register_buffer("mean", torch.zeros(64))

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        given = given.clone().mul_(2)
        hidden = self.first(given)
        hidden[:, :8] = 0
        if self.training:
            self.mean.lerp_(hidden.detach().mean(0), 0.1)
        hidden -= self.mean
        return self.out(self.second(hidden.relu_()).add_(1).sigmoid_())


class WrittenOver(InPlace):
    """Writes over what its backward pass would need: it only ever ran forward."""

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        hidden = self.first(given).relu_()
        hidden -= self.mean
        return self.out(self.second(hidden))


def without_gradients(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(batch)


class Checkpointed(nn.Module):
    """Chen et al. 2016: what is between is computed again for the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.Linear(64, 64), nn.ReLU(inplace=True)) for _ in range(4))
        )
        self.out = nn.Linear(64, 8)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        if self.reentrant:
            given = given.requires_grad_() if not given.requires_grad else given
            hidden = checkpoint_sequential(self.blocks, 2, given, use_reentrant=True)
        else:
            hidden = given
            for block in self.blocks:
                hidden = checkpoint(block, hidden, use_reentrant=False)
        return self.out(hidden)


class Recursive(nn.Module):
    """Socher et al. 2013: a tree given as nested tuples, a layer called for every node."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 48)
        self.join, self.out = nn.Linear(96, 48), nn.Linear(48, 5)

    def forward(self, tree: Any) -> torch.Tensor:
        return self.out(self.node(tree))

    def node(self, tree: Any) -> torch.Tensor:
        if isinstance(tree, torch.Tensor):
            return self.embedding(tree)
        return torch.tanh(self.join(torch.cat([self.node(part) for part in tree], -1)))


class Methods(nn.Module):
    """No forward pass: the caller's `forward=` calls other methods."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(48, 96), nn.Linear(96, 48)

    def encode(self, given: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.encoder(given))

    def decode(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.decoder(hidden)


class Single(nn.Module):
    """Samples without an axis of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 32, 3, 2, 1), nn.Linear(2048, 10)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.conv(given)).flatten())


class Mixed(nn.Module):
    """Outputs of integers, booleans, an empty tensor, a scalar and a complex one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(48, 96), nn.Linear(96, 10)

    def forward(self, given: torch.Tensor) -> tuple[Any, ...]:
        logits = self.out(torch.relu(self.first(given)))
        best = logits.argmax(-1)
        return best, logits, best == 3, logits[:0], logits.mean(), torch.fft.rfft(logits)


@dataclass
class Ray:
    origin: torch.Tensor
    far: float


class Field(nn.Module):
    """Mildenhall et al. 2020: a perceptron of coordinates, called with a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(36, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 4)
        )

    def forward(self, ray: Ray) -> torch.Tensor:
        angles = (ray.origin / ray.far)[..., None] * 2.0 ** torch.arange(6)
        return self.layers(torch.cat([angles.sin(), angles.cos()], -1).flatten(-2))


class Inference(nn.Module):
    """Decorated with inference_mode: it never gives gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(48, 96), nn.Linear(96, 10)

    @torch.inference_mode()
    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.first(given)))


class Discrete(nn.Module):
    """Gives classes, no real numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(48, 96), nn.Linear(96, 10)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.first(given))).argmax(-1)


class Stateful(nn.Module):
    """Keeps what it last gave in attributes, a tensor with a graph among it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(48, 96), nn.Linear(96, 10)
        self.last: torch.Tensor | None = None

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        self.last = torch.relu(self.first(given))
        return self.out(self.last)


def keywords() -> dict[str, Any]:
    return {"left": torch.randn(4, 32), "right": torch.randn(4, 24), "mode": "sum", "weight": 0.5}


def tree() -> Any:
    one, two, three, four = torch.randint(100, (4, 2)).unbind()
    return (((one, (two, three)), four),)  # positional arguments: one tree


def autoencode(model: Any, batch: torch.Tensor) -> torch.Tensor:
    return model.decode(model.encode(batch))


ARCHITECTURES = (
    Architecture(
        "Control flow of the data", Branching, noise(8, 48), uneven="the data decides what is run"
    ),
    Architecture("Several exits", EarlyExit, noise(8, 48)),
    Architecture("Keywords alone", Keywords, batches(keywords)),
    Architecture(
        "Dicts and lists as arguments",
        Nested,
        batches(lambda: (({"a": torch.randn(4, 24), "b": torch.randn(4, 32)}, [0.5, 2.0]),)),
    ),
    Architecture("In place", InPlace, noise(8, 48)),
    Architecture(
        "What backward needs is written over", WrittenOver, noise(8, 48), refusal="run backward"
    ),
    Architecture(
        "The same without gradients",
        WrittenOver,
        noise(8, 48),
        forward=without_gradients,
        trained=False,
        recovered=False,
    ),
    Architecture("Checkpointed", lambda: Checkpointed(False), noise(8, 64)),
    Architecture("Checkpointed, reentrant", lambda: Checkpointed(True), noise(8, 64)),
    Architecture("Recursive over a tree", Recursive, batches(lambda: (tree(),))),
    Architecture(
        "No forward, but forward=", Methods, noise(8, 48), forward=autoencode, exported=False
    ),
    Architecture("Samples without a batch axis", Single, noise(3, 16, 16)),
    Architecture("Outputs of every type", Mixed, noise(8, 48)),
    Architecture(
        "A dataclass as the input",
        Field,
        batches(lambda: (Ray(torch.randn(16, 3), 2.0),)),
        exported=False,
    ),
    Architecture("Inference mode inside", Inference, noise(8, 48), trained=False, recovered=False),
    Architecture("Classes as outputs", Discrete, noise(8, 48), refusal="real numbers"),
    Architecture("State kept in attributes", Stateful, noise(8, 48)),
)
