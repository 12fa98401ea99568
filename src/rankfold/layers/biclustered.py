"""A convolution between groups of channels: a small chain for each pair of an in- and output group.

All chains together are one of grouped convolutions, between which channels are put in other orders.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from rankfold.errors import RankError
from rankfold.layers.chain import Convolution, all_axes, dense_convolution, kernel_of, link
from rankfold.layers.form import factors_of
from rankfold.layers.selected import ChannelSelection


class BiclusteredConvolution(nn.Sequential):
    """The input groups' order; grouped `Conv 1x1`, `Conv k`, `Conv 1x1`; the outputs' own order.

    Each block, of an output group and an input group, is `Conv 1x1 in→r_in`, `Conv k r_in→r_out`
    (stride, padding, dilation) and `Conv 1x1 r_out→out`, of CP `Conv k` is depthwise (Denton et al.
    2014, section 3.2). The first convolution is one for each input group, the last one for each
    output group, which adds up its blocks: before it `nn.ChannelShuffle` brings them together. What
    a single group does not need is left out.
    """

    def __init__(
        self,
        layer: Convolution,
        groups: tuple[int, int],
        ranks: Sequence[int],
        orders: tuple[torch.Tensor, torch.Tensor],
        depthwise: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        """The geometry, bias and dtype of `layer`, with torch's initial values.

        `groups`, `ranks` and `orders` are those of the outputs, then those of the inputs; an order
        is int64, the channels of the first group, then of the next. The bias stands in the order
        of the groups. On `device`, or that of `layer`. Raises RankError for groups that do not
        divide the channels, ranks below 1, and ranks that differ where the kernel is `depthwise`.
        """
        for count, channels in zip(groups, (layer.out_channels, layer.in_channels), strict=True):
            if count < 1 or channels % count:
                raise RankError(f"{count} groups do not divide {channels} channels of {layer}")
        if min(ranks) < 1:
            raise RankError(f"rank {tuple(ranks)} is below 1")
        if depthwise and ranks[0] != ranks[1]:
            raise RankError(f"ranks {tuple(ranks)} of a depthwise kernel are not one")
        r_out, r_in = (math.prod(groups) * rank for rank in ranks)
        where = device or layer.weight.device
        mode, bias = 1 - layer.weight.dim(), layer.bias is not None
        pairs = r_in if depthwise else math.prod(groups)
        super().__init__()
        if groups[1] > 1:
            self.append(ChannelSelection(orders[1], mode, where))
        self.append(link(layer, layer.in_channels, r_in, groups=groups[1], device=device))
        self.append(link(layer, r_in, r_out, all_axes(layer), groups=pairs, device=device))
        if min(groups) > 1:
            self.append(nn.ChannelShuffle(groups[1]))
        outputs = layer.out_channels
        self.append(link(layer, r_out, outputs, groups=groups[0], bias=bias, device=device))
        if groups[0] > 1:
            self.append(ChannelSelection(orders[0].argsort(), mode, where))
        self.groups = groups

    def to_dense(self) -> Convolution:
        """The `nn.Conv1d`, `2d` or `3d` that this represents."""
        first, core, last = (cast(Convolution, one) for one in factors_of(self))
        before = kernel_of([(one.weight, one.groups) for one in (first, core)])
        if min(self.groups) > 1:
            before = before.unflatten(0, (self.groups[1], -1)).transpose(0, 1).flatten(0, 1)
        weight = kernel_of([(before, 1), (last.weight, last.groups)])
        bias = last.bias
        if self.groups[1] > 1:
            weight = weight[:, cast(ChannelSelection, self[0]).channels.argsort()]
        if self.groups[0] > 1:
            places = cast(ChannelSelection, self[-1]).channels
            weight = weight[places]
            bias = bias if bias is None else bias[places]
        chain = nn.Sequential(first, core, last).train(self.training)
        dense = dense_convolution(chain, weight)
        if bias is not None:
            dense.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
        return dense
