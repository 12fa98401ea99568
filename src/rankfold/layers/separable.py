"""Convolutions along one axis of the kernel after the other."""

import math
from collections.abc import Sequence

import torch

from rankfold.layers.chain import Convolution, axis_groups, link
from rankfold.layers.form import check_ranks
from rankfold.layers.linked import LinkedConvolution


def two_groups(layer: Convolution) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes before the second that is longer than 1, and the others: vertical and horizontal."""
    first, *others = axis_groups(layer)
    return first, tuple(axis for group in others for axis in group)


def split_kernel(layer: Convolution) -> torch.Tensor:
    """The weight (out, in, vertical, horizontal): the axes of each of the two groups as one."""
    vertical, _ = two_groups(layer)
    length = math.prod(layer.kernel_size[axis] for axis in vertical)
    return layer.weight.detach().reshape(layer.out_channels, layer.in_channels, length, -1)


class SeparableConvolution(LinkedConvolution):
    """`Conv kx1 in→rank (stride, ... of this axis)`, `Conv 1xk rank→out (of the other)`.

    Scheme 2 of Jaderberg et al. 2014. Of a 3-D kernel the first axis longer than 1 is the vertical
    one, the others together are the horizontal.
    """

    def __init__(
        self, layer: Convolution, rank: int, device: torch.device | str | None = None
    ) -> None:
        """The geometry, bias and dtype of `layer`, with torch's initial values.

        On `device`, or that of `layer`. Raises RankError for a rank outside
        1..min(in * vertical, out * horizontal length of the kernel).
        """
        check_ranks((rank,), (separable_limit(layer),), layer)
        vertical, horizontal = two_groups(layer)
        bias = layer.bias is not None
        super().__init__(
            link(layer, layer.in_channels, rank, vertical, device=device),
            link(layer, rank, layer.out_channels, horizontal, bias=bias, device=device),
        )


class SeparableBottleneck(LinkedConvolution):
    """`Conv kx1 in→r_1`, `Conv 1xk r_1→r_2`, `Conv 1x1 r_2→out`.

    The asymmetric 3-D form of Zhang et al. 2016. Ranks are given as (r_1, r_2), in the order of
    the links.
    """

    def __init__(
        self,
        layer: Convolution,
        ranks: Sequence[int],
        device: torch.device | str | None = None,
    ) -> None:
        """The geometry, bias and dtype of `layer`, with torch's initial values.

        On `device`, or that of `layer`. Raises RankError for ranks outside those of
        `SeparableConvolution` and 1..min(out, in * kernel size).
        """
        limits = separable_limit(layer), min(layer.out_channels, layer.weight[0].numel())
        check_ranks(ranks, limits, layer)
        between, outputs = ranks
        vertical, horizontal = two_groups(layer)
        bias = layer.bias is not None
        super().__init__(
            link(layer, layer.in_channels, between, vertical, device=device),
            link(layer, between, outputs, horizontal, device=device),
            link(layer, outputs, layer.out_channels, bias=bias, device=device),
        )


def separable_limit(layer: Convolution) -> int:
    """The full rank: the lesser side of the unfolding (in * vertical) x (out * horizontal)."""
    outputs, inputs, vertical, horizontal = split_kernel(layer).shape
    return min(inputs * vertical, outputs * horizontal)
