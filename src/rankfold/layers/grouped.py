"""A grouped convolution as a chain of grouped ones."""

from typing import cast

from torch import nn

from rankfold.layers.chain import Convolution
from rankfold.layers.linked import LinkedConvolution


class GroupedConvolution(LinkedConvolution):
    """Equal chains of links, one for the channels of each group, side by side as one chain.

    The k-th links of all chains are one link, their weights one below the other: it has `groups`
    times the channels and `groups` times the groups.
    """

    def __init__(self, chain: nn.Sequential, groups: int, bias: bool = False) -> None:
        """`groups` copies of a chain, on the meta device; the last link may have a bias."""
        super().__init__()
        self.groups = groups
        for place, one in enumerate(cast("list[Convolution]", list(chain))):
            grouped = type(one)(
                groups * one.in_channels,
                groups * one.out_channels,
                one.kernel_size,  # type: ignore[arg-type]
                one.stride,  # type: ignore[arg-type]
                one.padding,  # type: ignore[arg-type]
                one.dilation,  # type: ignore[arg-type]
                groups * one.groups,
                bias and place == len(chain) - 1,
                one.padding_mode,
                "meta",
                one.weight.dtype,
            )
            grouped.weight.requires_grad_(one.weight.requires_grad)
            self.append(grouped)
