"""A convolution each of whose filters sees one mixture of the input channels, its colour."""

from typing import cast

import torch
from torch import nn

from rankfold.layers.chain import Convolution, all_axes, dense_convolution, link
from rankfold.layers.form import check_ranks, factors_of
from rankfold.layers.selected import ChannelSelection


class MonochromaticConvolution(nn.Sequential):
    """`Conv 1x1 in→colours`, `ChannelSelection` of a colour for each output, depthwise `Conv k`.

    The form of Denton et al. 2014, section 3.1. Where each output has a colour of its own, nothing
    is selected. As the colours are selected before the filters, the outputs are in their order, and
    colours may have any number of them.
    """

    def __init__(
        self,
        layer: Convolution,
        colours: int,
        selected: torch.Tensor,
        device: torch.device | str | None = None,
    ) -> None:
        """The geometry, bias and dtype of `layer`, with torch's initial values.

        `selected` (out,), int64, is the colour of each output, not looked at where there are as
        many. On `device`, or that of `layer`. Raises RankError for colours outside 1..out.
        """
        outputs, bias = layer.out_channels, layer.bias is not None
        check_ranks((colours,), (outputs,), layer)
        super().__init__(link(layer, layer.in_channels, colours, device=device))
        if colours < outputs:
            mode = 1 - layer.weight.dim()
            self.append(ChannelSelection(selected, mode, device or layer.weight.device))
        axes = all_axes(layer)
        self.append(link(layer, outputs, outputs, axes, groups=outputs, bias=bias, device=device))

    def to_dense(self) -> Convolution:
        """The `nn.Conv1d`, `2d` or `3d` that this represents."""
        first, last = (cast(Convolution, one) for one in factors_of(self))
        colours = first.weight
        if len(self) == 3:
            colours = colours[cast(ChannelSelection, self[1]).channels]
        return dense_convolution(self, colours * last.weight)
