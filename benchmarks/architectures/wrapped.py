"""Networks inside of what others put around them: compilers, data parallelism, scripts."""

import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from architectures.architecture import Architecture, images, noise


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 48, 3), nn.Flatten(), nn.Linear(1728, 8)
    )


def compiled_in_place() -> nn.Module:
    network = convolutional()
    network.compile(backend="eager")
    return network


def compiled_block() -> nn.Module:
    """One of the parts is compiled, the whole is not."""
    network = convolutional()
    network[2].compile(backend="eager")
    return network


def compiled_part() -> nn.Module:
    """A part that is a compiled module of its own, with the name that this gives."""
    network = convolutional()
    body = torch.compile(network[:3], backend="eager")
    return nn.Sequential(body, *network[3:])


def distributed() -> nn.Module:
    if not torch.distributed.is_initialized():
        place = Path(tempfile.mkdtemp(), "meeting")
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{place}", rank=0, world_size=1
        )
    return DistributedDataParallel(convolutional())


class Holder(nn.Module):
    """What a training framework puts around a network: losses, metrics, a teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.teacher = convolutional(), convolutional().requires_grad_(False)
        self.criterion = nn.CrossEntropyLoss(weight=torch.rand(8))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images)


class ForwardReplaced(nn.Module):
    """The forward of a layer is another function, put on the object."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(48, 64), nn.Linear(64, 64), nn.Linear(64, 8)
        self.second.forward = self._doubled

    def _doubled(self, given: torch.Tensor) -> torch.Tensor:
        return 2 * nn.functional.linear(given, self.second.weight, self.second.bias)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.second(torch.relu(self.first(given)))))


class Cached(nn.Module):
    """Keeps its layers in a plain list beside the modules: a second way to them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList([nn.Linear(48, 64), nn.Linear(64, 64)])
        self.out = nn.Linear(64, 8)
        self.order = [self.body[0], self.body[1]]

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        for layer in self.order:
            given = torch.relu(layer(given))
        return self.out(given)


class Lookup(nn.Module):
    """Runs what `getattr` finds, by names that are made."""

    def __init__(self) -> None:
        super().__init__()
        for index in range(3):
            setattr(self, f"layer_{index}", nn.Linear(48, 48))

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        for index in range(3):
            given = torch.relu(getattr(self, f"layer_{index}")(given))
        return given


def scripted_part() -> nn.Module:
    network = convolutional()
    return nn.Sequential(torch.jit.script(network[:2]), *network[2:])


def traced_by_fx() -> nn.Module:
    return torch.fx.symbolic_trace(convolutional())


ARCHITECTURES = (
    Architecture(
        "torch.compile'd",
        lambda: torch.compile(convolutional(), backend="eager"),
        images(16),
        refusal="torch.compile",
    ),
    Architecture("Compiled in place", compiled_in_place, images(16)),
    Architecture("A compiled part", compiled_part, images(16)),
    Architecture("A part compiled in place", compiled_block, images(16)),
    Architecture(
        "DistributedDataParallel", distributed, images(16), refusal="DistributedDataParallel"
    ),
    Architecture("DataParallel", lambda: nn.DataParallel(convolutional()), images(16)),
    Architecture("Averaged weights", lambda: AveragedModel(convolutional()), images(16)),
    Architecture(
        "TorchScript", lambda: torch.jit.script(convolutional()), images(16), refusal="TorchScript"
    ),
    Architecture("A scripted part", scripted_part, images(16)),
    Architecture("GraphModule of torch.fx", traced_by_fx, images(16)),
    Architecture("Held by a training module", Holder, images(16)),
    Architecture("A layer's forward replaced", ForwardReplaced, noise(8, 48)),
    Architecture("Layers in a plain list too", Cached, noise(8, 48)),
    Architecture("Layers found by getattr", Lookup, noise(8, 48)),
)
