"""Networks in which channels go together in every way, to make groups of 0 and take them out of."""

from collections.abc import Callable
from typing import Any

import torch
from tensors import tensor_of
from torch import nn
from torch.nn import functional

from rankfold.sparsity import GroupLasso


class Body(nn.Module):
    """Layers of 6 channels and what is done with them; what is given has 6 channels too."""

    def __init__(self, body: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.first = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.third = nn.Conv2d(6, 6, 3, padding=1)
        self.strided = nn.Conv2d(6, 6, 3, stride=2, padding=1, bias=False)
        self.shortcut = nn.Conv2d(6, 6, 1, stride=2)
        self.point = nn.Conv2d(6, 8, 1)
        self.squeeze, self.excite = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 6, 1)
        self.spatial = nn.Conv2d(6, 1, 1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.multiplied = nn.Conv2d(6, 12, 3, padding=1, groups=6)
        self.grouped = nn.Conv2d(6, 6, 3, groups=3, padding=1)
        self.reflected = nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect")
        self.transposed = nn.ConvTranspose2d(6, 6, 3, stride=2)
        self.grouped_transposed = nn.ConvTranspose2d(6, 6, 3, groups=3)
        self.linear, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.wide, self.flat = nn.Linear(6, 12), nn.Linear(6 * 64, 5)
        self.both = nn.Conv2d(12, 5, 3, padding=1)
        self.out = nn.Conv2d(6, 5, 3, padding=1)
        self.small_out = nn.Conv2d(3, 5, 3, padding=1)
        self.norm, self.other, self.third_norm = (nn.BatchNorm2d(6) for _ in range(3))
        self.plain_norm = nn.BatchNorm2d(6, affine=False)
        self.rows_norm = nn.BatchNorm1d(6)
        self.instance = nn.InstanceNorm2d(6, affine=True)
        self.layer_norm = nn.LayerNorm(6)
        self.prelu, self.one_slope = nn.PReLU(6), nn.PReLU()
        self.relu = nn.ReLU(inplace=True)
        self.scale = nn.Parameter(torch.randn(6, 1, 1))
        self.body = body
        self.double()

    def forward(self, given: torch.Tensor) -> Any:
        return self.body(self, given)


def rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.mean((2, 3))


def shuffled(tensor: torch.Tensor, groups: int) -> torch.Tensor:
    split = tensor.unflatten(1, (groups, -1))
    return split.transpose(1, 2).flatten(1, 2)


def gated(self: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = functional.relu(self.first(x))
    gate = self.excite(functional.relu(self.squeeze(functional.adaptive_avg_pool2d(hidden, 1))))
    return self.out(hidden * gate.sigmoid())


def dense_block(self: Any, x: torch.Tensor) -> torch.Tensor:
    first = torch.relu(self.norm(self.first(x)))
    return self.both(torch.cat([first, torch.relu(self.second(first))], 1))


def basic_block(self: Any, x: torch.Tensor) -> torch.Tensor:
    stem = self.relu(self.third_norm(self.third(x)))
    hidden = self.relu(self.norm(self.first(stem)))
    hidden = self.other(self.second(hidden))
    hidden += stem
    return self.out(self.relu(hidden))


def two_blocks(self: Any, x: torch.Tensor) -> torch.Tensor:
    stem = self.norm(self.first(x)).relu()
    stem = stem + self.second(stem.relu())
    return self.out(stem + self.reflected(self.third(stem)))


def projected(self: Any, x: torch.Tensor) -> torch.Tensor:
    stem = self.first(x).relu()
    return self.out(self.norm(self.strided(stem)) + self.shortcut(stem))


def before_activation(self: Any, x: torch.Tensor) -> torch.Tensor:
    stem = self.first(x)
    return self.out(stem + self.third(self.relu(self.norm(stem))))


def u_shape(self: Any, x: torch.Tensor) -> torch.Tensor:
    high = self.first(x).relu()
    low = self.second(functional.max_pool2d(high, 2)).relu()
    up = functional.interpolate(low, scale_factor=2, mode="bilinear")
    return self.both(torch.cat([high, up], 1))


def halves(self: Any, x: torch.Tensor) -> torch.Tensor:
    first, second = self.first(x).chunk(2, 1)
    return self.small_out(first * second.sigmoid())


def written_width(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.flat(self.second(self.first(x).relu()).relu().view(-1, 384))


# By what a network does, the network, and the kinds of which it has groups.
BODIES: dict[str, tuple[Callable[[Any, torch.Tensor], Any], tuple[str, ...]]] = {
    "one after the other": (
        lambda self, x: self.out(self.relu(self.norm(self.first(x)))),
        ("filters", "channels", "shapes"),
    ),
    "a bias and no norm": (
        lambda self, x: self.out(self.relu(self.second(x))),
        ("filters", "channels", "shapes"),
    ),
    "a norm without scale": (
        lambda self, x: self.out(self.plain_norm(self.first(x)).relu()),
        ("filters", "channels"),
    ),
    "an instance norm": (
        lambda self, x: self.out(self.instance(self.first(x)).relu()),
        ("filters", "channels"),
    ),
    "a norm of what else is read": (
        lambda self, x: (lambda h: self.out(self.norm(h)) + self.both(torch.cat([h, h], 1)))(
            self.first(x)
        ),
        ("filters", "channels"),
    ),
    "slopes of channels": (lambda self, x: self.out(self.prelu(self.second(x))), ("filters",)),
    "one slope": (lambda self, x: self.out(self.one_slope(self.second(x))), ("filters",)),
    "all kinds of activations": (
        lambda self, x: self.out(
            functional.hardswish(functional.gelu(functional.leaky_relu(self.second(x), 0.1)))
        ),
        ("filters", "channels"),
    ),
    "an activation that makes something of nothing": (
        lambda self, x: self.out(self.second(x).sigmoid() + 1),
        ("channels",),
    ),
    "flattened": (
        lambda self, x: self.flat(self.relu(self.second(x)).flatten(1)),
        ("filters", "channels"),
    ),
    "flattened to a width that is written": (written_width, ("filters",)),
    "pooled": (
        lambda self, x: self.head(rows(functional.max_pool2d(self.norm(self.first(x)), 2))),
        ("filters", "channels"),
    ),
    "linear layers": (
        lambda self, x: self.head(self.relu(self.linear(rows(x)))),
        ("filters", "channels"),
    ),
    "linear layers along the last axis": (
        lambda self, x: self.head(self.linear(x.transpose(1, 3)[:, :, 0]).relu()),
        ("filters", "channels"),
    ),
    "a norm of rows": (
        lambda self, x: self.head(self.rows_norm(self.linear(rows(x))).relu()),
        ("filters", "channels"),
    ),
    "a residual block": (basic_block, ("filters", "channels", "depth")),
    "two residual blocks": (two_blocks, ("filters", "channels", "depth")),
    "a projected shortcut": (projected, ("filters", "channels")),
    "norms before": (before_activation, ("filters", "channels", "depth")),
    "concatenated": (dense_block, ("filters", "channels")),
    "concatenated with what is given": (
        lambda self, x: self.both(torch.cat([self.second(x), x], 1)),
        ("filters", "channels"),
    ),
    "upsampled and concatenated": (u_shape, ("filters", "channels")),
    "halves": (halves, ("filters", "channels")),
    "the third channel": (
        lambda self, x: (lambda h: self.out(self.third(h)) * h[:, 2:3])(self.second(x)),
        ("filters", "channels"),
    ),
    "shuffled": (
        lambda self, x: self.out(shuffled(self.norm(self.first(x)), 2)),
        ("filters", "channels"),
    ),
    "a gate": (gated, ("filters", "channels")),
    "a gate of places": (
        lambda self, x: (lambda h: self.out(h * self.spatial(h).sigmoid()))(self.second(x)),
        ("filters", "channels"),
    ),
    "depthwise": (
        lambda self, x: self.out(self.depthwise(self.second(x).relu()).relu()),
        ("filters", "channels"),
    ),
    "depthwise, to more": (
        lambda self, x: self.both(self.multiplied(self.second(x).relu()).relu()),
        ("filters", "channels"),
    ),
    "depthwise, norms": (
        lambda self, x: self.out(self.other(self.depthwise(self.norm(self.first(x)).relu()))),
        ("filters", "channels"),
    ),
    "grouped": (
        lambda self, x: self.out(self.grouped(self.second(x).relu()).relu()),
        ("filters", "channels"),
    ),
    "reflected": (
        lambda self, x: self.out(self.reflected(self.second(x).relu()).relu()),
        ("filters", "channels", "shapes"),
    ),
    "transposed": (
        lambda self, x: self.out(self.transposed(self.second(x).relu()).relu()),
        ("filters", "channels"),
    ),
    "grouped and transposed": (
        lambda self, x: self.out(self.grouped_transposed(self.second(x).relu()).relu()),
        ("filters", "channels"),
    ),
    "called twice": (
        lambda self, x: self.out(self.first(self.norm(self.first(x)).relu())),
        (),
    ),
    "two calls of one layer": (
        lambda self, x: self.out(self.second(self.third(x)) + self.second(x.relu())),
        ("filters", "channels"),
    ),
    "another mean of channels": (
        lambda self, x: self.out(self.second(x)) * self.third(x).mean(1, keepdim=True),
        ("filters", "channels"),
    ),
    "a layer norm": (
        lambda self, x: self.head(self.layer_norm(self.linear(self.linear(rows(x)).relu()))),
        (),
    ),
    "a scale of no module": (
        lambda self, x: self.out(self.second(self.third(x)) * self.scale),
        ("filters", "channels"),
    ),
    "padded": (
        lambda self, x: self.out(functional.pad(self.second(x), (1, 0, 2, 1))),
        ("filters", "channels"),
    ),
    "written over": (
        lambda self, x: self.out(torch.relu_(self.second(x).mul_(2)).add_(self.first(x))),
        ("filters", "channels"),
    ),
    "a weight that is read": (
        lambda self, x: self.out(self.second(x) * self.second.weight.mean()),
        (),
    ),
}


def make(name: str, seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    """The network in eval mode, its norms far from trivial, and a batch."""
    torch.manual_seed(seed)
    model = Body(BODIES[name][0]).eval()
    for index, module in enumerate(model.modules()):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_mean, module.weight, module.bias):
                if tensor is not None:
                    tensor.data.copy_(tensor_of(tensor.shape, seed=seed + index))
            module.running_var.copy_(tensor_of(module.running_var.shape, seed=seed).square() + 0.1)
    return model, tensor_of((2, 6, 8, 8), seed=seed + 7)


def put_to_zero(model: nn.Module, lasso: GroupLasso, share: float, seed: int = 0) -> int:
    """Some of the groups of a lasso, but the first of each kind; how many there were."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    generator = torch.Generator().manual_seed(seed)
    count = 0
    for groups in lasso.groups:
        gone = torch.rand(groups.count, generator=generator) < share
        gone[0] = False
        count += int(gone.sum())
        for one in (*groups.measured, *groups.cleared):
            chosen = (one.groups >= 0) & gone[one.groups]
            with torch.no_grad():
                tensors[one.name].mul_((~chosen).to(tensors[one.name]))
    return count
