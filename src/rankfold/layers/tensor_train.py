"""A convolution along one axis of the kernel after the other, between two maps of the channels."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch

from rankfold.layers.chain import Convolution, axis_groups, link
from rankfold.layers.form import check_ranks
from rankfold.layers.linked import LinkedConvolution


class TensorTrainConvolution(LinkedConvolution):
    """`Conv 1x1 in→r_1`, `Conv kx1 r_1→r_2`, `Conv 1xk r_2→r_3`, `Conv 1x1 r_3→out`.

    One link for each axis of the kernel longer than 1, with its stride, padding and dilation.
    """

    def __init__(
        self,
        layer: Convolution,
        ranks: Sequence[int],
        device: torch.device | str | None = None,
    ) -> None:
        """The geometry, bias and dtype of `layer`, with torch's initial values.

        On `device`, or that of `layer`. Raises RankError for ranks outside `train_limits`.
        """
        check_ranks(ranks, train_limits(layer), layer)
        links = [link(layer, layer.in_channels, ranks[0], device=device)]
        for (before, after), axes in zip(pairwise(ranks), axis_groups(layer), strict=True):
            links.append(link(layer, before, after, axes, device=device))
        bias = layer.bias is not None
        links.append(link(layer, ranks[-1], layer.out_channels, bias=bias, device=device))
        super().__init__(*links)


def train_modes(layer: Convolution) -> tuple[int, ...]:
    """The lengths of the modes, in the order of the train: in, kernel, out."""
    kernel = (math.prod(layer.kernel_size[axis] for axis in axes) for axes in axis_groups(layer))
    return (layer.in_channels, *kernel, layer.out_channels)


def train_limits(layer: Convolution) -> tuple[int, ...]:
    """The greatest rank between each two modes."""
    modes = train_modes(layer)
    return tuple(
        min(math.prod(modes[:bond]), math.prod(modes[bond:])) for bond in range(1, len(modes))
    )
