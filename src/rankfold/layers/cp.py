"""A convolution of which each term filters one mixture of the inputs by itself."""

import math
from collections.abc import Sequence

import torch

from rankfold.layers.chain import Convolution, all_axes, axis_groups, link
from rankfold.layers.form import check_ranks
from rankfold.layers.linked import LinkedConvolution


class CPConvolution(LinkedConvolution):
    """`Conv 1x1 in→rank`, depthwise `Conv k` (stride, padding, dilation), `Conv 1x1 rank→out`.

    With `separable` one depthwise convolution for each axis of the kernel that is longer than 1:
    `kx1`, then `1xk` (Lebedev et al. 2015).
    """

    def __init__(
        self,
        layer: Convolution,
        rank: int,
        separable: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        """The geometry, bias and dtype of `layer`, with torch's initial values.

        On `device`, or that of `layer`. Raises RankError for a rank outside 1..`cp_limit`.
        """
        check_ranks((rank,), (cp_limit(layer, separable),), layer)
        links = [link(layer, layer.in_channels, rank, device=device)]
        links += [
            link(layer, rank, rank, axes, groups=rank, device=device)
            for axes in filtered_axes(layer, separable)
        ]
        bias = layer.bias is not None
        links.append(link(layer, rank, layer.out_channels, bias=bias, device=device))
        super().__init__(*links)


def filtered_axes(layer: Convolution, separable: bool) -> Sequence[tuple[int, ...]]:
    """The axes of each depthwise link."""
    return axis_groups(layer) if separable else [all_axes(layer)]


def cp_modes(layer: Convolution, separable: bool) -> tuple[int, ...]:
    """The lengths of the modes: outputs, inputs, and the places that each depthwise link spans."""
    kernel = (
        math.prod(layer.kernel_size[axis] for axis in axes)
        for axes in filtered_axes(layer, separable)
    )
    return (layer.out_channels, layer.in_channels, *kernel)


def cp_limit(layer: Convolution, separable: bool) -> int:
    """The rank at which every weight of this shape has an exact decomposition."""
    modes = cp_modes(layer, separable)
    return math.prod(modes) // max(modes)
