"""What a case of the sweep is, and random data of every kind."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from rankfold.batches import Forward, run

Data = Sequence[Any]
_BATCHES = 6


@dataclass(frozen=True)
class Architecture:
    """A network with random weights, and what it is run on."""

    name: str
    build: Callable[[], nn.Module]
    data: Callable[[], Data]
    forward: Forward = run
    refusal: str | None = None  # words of the typed error that is the right answer to it
    package: str | None = None  # that has to be installed
    metric: str = "auto"  # of the analysis
    exported: bool = True  # whether to try files of it: not where the dense one never has any
    trained: bool = True  # whether its outputs have gradients at all
    saved: bool = True  # whether its state is of tensors alone
    uneven: str | None = None  # why its MACs are not those that a plan counts
    recovered: bool = True  # whether a step of recovery is cheap and possible

    def make(self) -> nn.Module:
        """The same weights every time, in eval mode; the caller's random state is kept."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.build().eval()

    def make_data(self) -> Data:
        """The same batches every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return self.data()

    @property
    def is_installed(self) -> bool:
        return self.package is None or find_spec(self.package) is not None


def settled(model: nn.Module, *inputs: Any, **named: Any) -> nn.Module:
    """With batch-norm statistics of these inputs, as of a network that was trained."""
    model.train()
    with torch.no_grad():
        for _ in range(10):
            model(*inputs, **named)
    return model.eval()


def noise(*shape: int, count: int = _BATCHES) -> Callable[[], Data]:
    """Batches of normal numbers of this shape, samples first."""
    return lambda: [torch.randn(shape) for _ in range(count)]


def images(size: int = 32, channels: int = 3, samples: int = 4) -> Callable[[], Data]:
    return noise(samples, channels, size, size)


def tokens(vocabulary: int, length: int = 12, samples: int = 4) -> Callable[[], Data]:
    """Batches of ids."""
    return lambda: [torch.randint(vocabulary, (samples, length)) for _ in range(_BATCHES)]


def batches(make: Callable[[], Any]) -> Callable[[], Data]:
    """Batches made one by one."""
    return lambda: [make() for _ in range(_BATCHES)]
