"""A convolution as a small one between two maps of the channels."""

from collections.abc import Sequence

import torch

from rankfold.layers.chain import Convolution, all_axes, link
from rankfold.layers.form import check_ranks
from rankfold.layers.linked import LinkedConvolution


class TuckerConvolution(LinkedConvolution):
    """`Conv 1x1 in→r_in`, `Conv k r_in→r_out (stride, padding, dilation)`, `Conv 1x1 r_out→out`.

    The Tucker-2 form of Kim et al. 2016. Ranks are given as (r_out, r_in), in the order of the
    weight's modes.
    """

    def __init__(
        self,
        layer: Convolution,
        ranks: Sequence[int],
        device: torch.device | str | None = None,
    ) -> None:
        """The geometry, bias and dtype of `layer`, with torch's initial values.

        On `device`, or that of `layer`. Raises RankError for ranks outside 1..out and 1..in.
        """
        check_ranks(ranks, (layer.out_channels, layer.in_channels), layer)
        rank_out, rank_in = ranks
        bias = layer.bias is not None
        super().__init__(
            link(layer, layer.in_channels, rank_in, device=device),
            link(layer, rank_in, rank_out, all_axes(layer), device=device),
            link(layer, rank_out, layer.out_channels, bias=bias, device=device),
        )
