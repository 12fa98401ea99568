"""A convolution as the sum of small ones, each between few mixtures of the channels."""

import torch

from rankfold.layers.chain import Convolution, all_axes, link
from rankfold.layers.form import check_ranks
from rankfold.layers.linked import LinkedConvolution


class BlockTermConvolution(LinkedConvolution):
    """`Conv 1x1 in→n w`, `Conv k` in n groups (stride, padding, dilation), `Conv 1x1 n w→out`.

    `blocks` n of `width` w channels, on a side with fewer channels of as many. With a width of 1 it
    is the form of CP, with one block that of Tucker-2.
    """

    def __init__(
        self,
        layer: Convolution,
        blocks: int,
        width: int,
        device: torch.device | str | None = None,
    ) -> None:
        """The geometry, bias and dtype of `layer`, with torch's initial values.

        On `device`, or that of `layer`. Raises RankError for blocks outside 1..`block_term_limit`.
        """
        check_ranks((blocks,), (block_term_limit(layer, width),), layer)
        w_out, w_in = (blocks * one for one in block_widths(layer, width))
        bias = layer.bias is not None
        super().__init__(
            link(layer, layer.in_channels, w_in, device=device),
            link(layer, w_in, w_out, all_axes(layer), groups=blocks, device=device),
            link(layer, w_out, layer.out_channels, bias=bias, device=device),
        )


def block_widths(layer: Convolution, width: int) -> tuple[int, int]:
    """The channels of one block: of outputs, of inputs."""
    return min(width, layer.out_channels), min(width, layer.in_channels)


def block_term_limit(layer: Convolution, width: int) -> int:
    """The number of blocks that hold every weight of this shape: all pairs of groups."""
    outputs, inputs = block_widths(layer, width)
    return -(-layer.out_channels // outputs) * -(-layer.in_channels // inputs)
