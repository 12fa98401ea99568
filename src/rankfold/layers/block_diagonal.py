"""A layer as the sum of two: one between groups of channels, one of low rank between all."""

import math
from typing import Any, cast

import torch
from torch import nn

from rankfold.errors import RankError
from rankfold.layers.chain import Convolution, all_axes, dense_convolution, kernel_of, link
from rankfold.layers.form import Dense, check_ranks, fill_dense


class GroupedLinear(nn.Module):
    """A linear layer in groups: outputs of a group from the inputs of this group alone.

    `weight` is (groups, out / groups, in / groups). A grouped convolution of one place does the
    same, on CPUs ten times as slowly.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        groups: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shape = groups, out_features // groups, in_features // groups
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.register_parameter("bias", None)  # beside it there is one that has a bias
        bound = shape[2] ** -0.5  # that of nn.Linear
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        groups, outputs, inputs = self.weight.shape
        by_group = tensor.reshape(-1, groups, inputs).transpose(0, 1)
        found = torch.bmm(by_group, self.weight.mT)
        return found.transpose(0, 1).reshape(*tensor.shape[:-1], groups * outputs)

    def extra_repr(self) -> str:
        groups, outputs, inputs = self.weight.shape
        return f"{groups * inputs}, {groups * outputs}, groups={groups}"


class BlockDiagonalLinear(nn.ModuleList):
    """`GroupedLinear(in, out)`, and beside it `Linear(in, rank)`, `Linear(rank, out)`: their sum.

    The bias is on the last. It is no chain, and hence no `nn.Sequential`.
    """

    def __init__(
        self, layer: nn.Linear, rank: tuple[int, ...], device: torch.device | str | None = None
    ) -> None:
        """The shape, bias and dtype of `layer`, with torch's initial values; on `device`, or its.

        `rank` is (inputs of a group, rank). Raises RankError where it is outside
        1..`block_diagonal_limits`, or groups of so many inputs do not divide both sides.
        """
        groups = _groups(layer, rank)
        inputs, outputs, bias = layer.in_features, layer.out_features, layer.bias is not None
        where = device or layer.weight.device, layer.weight.dtype
        super().__init__(
            [
                GroupedLinear(inputs, outputs, groups, *where),
                nn.Linear(inputs, rank[1], False, *where),
                nn.Linear(rank[1], outputs, bias, *where),
            ]
        )

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        blocks, first, last = self
        return blocks(tensor) + last(first(tensor))

    def to_dense(self) -> nn.Linear:
        """The `nn.Linear` that this represents."""
        blocks, first, last = (cast(Any, one) for one in self)
        weight = torch.block_diag(*blocks.weight) + last.weight @ first.weight
        dense = nn.Linear(
            first.in_features, last.out_features, last.bias is not None, "meta", weight.dtype
        )
        fill_dense(dense, weight, self)
        return dense


class BlockDiagonalConvolution(nn.ModuleList):
    """`Conv k in→out` in groups, and beside it `Conv k in→rank`, `Conv 1x1 rank→out`: their sum.

    Both with the stride, padding and dilation of the dense layer. The bias is on the last. It is no
    chain, and hence no `nn.Sequential`.
    """

    def __init__(
        self, layer: Convolution, rank: tuple[int, ...], device: torch.device | str | None = None
    ) -> None:
        """The geometry, bias and dtype of `layer`, with torch's initial values.

        On `device`, or that of `layer`. `rank` is (inputs of a group, rank); raises RankError where
        it is outside 1..`block_diagonal_limits`, or groups of so many do not divide both sides.
        """
        groups, axes = _groups(layer, rank), all_axes(layer)
        inputs, outputs, bias = layer.in_channels, layer.out_channels, layer.bias is not None
        super().__init__(
            [
                link(layer, inputs, outputs, axes, groups=groups, device=device),
                link(layer, inputs, rank[1], axes, device=device),
                link(layer, rank[1], outputs, bias=bias, device=device),
            ]
        )

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        blocks, first, last = self
        return blocks(tensor) + last(first(tensor))

    def to_dense(self) -> Convolution:
        """The `nn.Conv1d`, `2d` or `3d` that this represents."""
        blocks, *chain = (cast(Convolution, one) for one in self)
        weight = kernel_of([(blocks.weight, blocks.groups)])
        weight = weight + kernel_of([(one.weight, 1) for one in chain])
        return dense_convolution(nn.Sequential(*chain).train(self.training), weight)


def possible_groups(layer: Dense) -> list[int]:
    """The numbers of groups, from two on, that divide inputs and outputs; none if nothing does."""
    shared = math.gcd(*layer.weight.shape[:2])
    return [count for count in range(2, shared + 1) if shared % count == 0]


def block_diagonal_limits(layer: Dense) -> tuple[int, int]:
    """The inputs of a group where groups are fewest, 0 if there are none; and the full rank."""
    groups = possible_groups(layer)
    return layer.weight.shape[1] // groups[0] if groups else 0, min(layer.weight.flatten(1).shape)


def _groups(layer: Dense, rank: tuple[int, ...]) -> int:
    check_ranks(rank, block_diagonal_limits(layer), layer)
    groups, rest = divmod(layer.weight.shape[1], rank[0])
    if rest or groups not in possible_groups(layer):
        raise RankError(f"groups of {rank[0]} inputs do not divide the two sides of {layer}")
    return groups
