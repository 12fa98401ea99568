"""A convolution whose terms filter few mixtures of the inputs, and add up to few of the outputs."""

from collections.abc import Sequence

import torch

from rankfold.layers.chain import Convolution, all_axes, link
from rankfold.layers.cp import cp_limit
from rankfold.layers.form import check_ranks
from rankfold.layers.linked import LinkedConvolution


class TuckerCPConvolution(LinkedConvolution):
    """`1x1 in→width`, `1x1 width→rank`, depthwise `k`, `1x1 rank→width`, `1x1 width→out`.

    Stride, padding and dilation are those of the depthwise link. Ranks are given as (rank, width);
    on a side with fewer channels than `width` it is their number.
    """

    def __init__(
        self,
        layer: Convolution,
        ranks: Sequence[int],
        device: torch.device | str | None = None,
    ) -> None:
        """The geometry, bias and dtype of `layer`, with torch's initial values.

        On `device`, or that of `layer`. Raises RankError for ranks outside `tucker_cp_limits`.
        """
        check_ranks(ranks, tucker_cp_limits(layer), layer)
        rank, width = ranks
        inner_in, inner_out = min(width, layer.in_channels), min(width, layer.out_channels)
        bias = layer.bias is not None
        super().__init__(
            link(layer, layer.in_channels, inner_in, device=device),
            link(layer, inner_in, rank, device=device),
            link(layer, rank, rank, all_axes(layer), groups=rank, device=device),
            link(layer, rank, inner_out, device=device),
            link(layer, inner_out, layer.out_channels, bias=bias, device=device),
        )


def tucker_cp_limits(layer: Convolution) -> tuple[int, int]:
    """The rank and the width at which every weight of this shape has an exact decomposition."""
    return cp_limit(layer, separable=False), max(layer.in_channels, layer.out_channels)
