"""A convolution as several small ones with one kernel, each between its own maps of channels."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from rankfold.layers.chain import Convolution, all_axes, dense_convolution, link
from rankfold.layers.form import check_ranks, factors_of
from rankfold.layers.shared import SharedLayer


class TensorRingConvolution(nn.Sequential):
    """`Conv 1x1 in→s r_in`, `Conv k r_in→r_out` of each of s slices, `Conv 1x1 s r_out→out`.

    The three cores of a ring of the modes in, kernel and out, whose rank between out and in is the
    number s of slices. One slice is the form of Tucker-2; with a kernel of its own for each slice
    it would be that of block terms. Stride, padding and dilation are the shared kernel's.
    """

    def __init__(
        self,
        layer: Convolution,
        ranks: Sequence[int],
        device: torch.device | str | None = None,
    ) -> None:
        """The geometry, bias and dtype of `layer`, with torch's initial values.

        `ranks` are (s, r_out, r_in). On `device`, or that of `layer`. Raises RankError for s
        outside 1..min(in, out), r_out outside 1..out and r_in outside 1..in.
        """
        outputs, inputs = layer.out_channels, layer.in_channels
        check_ranks(ranks, (min(outputs, inputs), outputs, inputs), layer)
        slices, rank_out, rank_in = ranks
        core = link(layer, rank_in, rank_out, all_axes(layer), device=device)
        bias = layer.bias is not None
        super().__init__(
            link(layer, inputs, slices * rank_in, device=device),
            SharedLayer(core, slices),
            link(layer, slices * rank_out, outputs, bias=bias, device=device),
        )

    def to_dense(self) -> Convolution:
        """The `nn.Conv1d`, `2d` or `3d` that this represents."""
        inputs, core, outputs = (one.weight for one in factors_of(self))
        slices = cast(SharedLayer, self[1]).slices
        apart = inputs.flatten(1).unflatten(0, (slices, -1))
        behind = torch.einsum("sri,qr...->sqi...", apart, core).flatten(0, 1)
        return dense_convolution(self, torch.tensordot(outputs.flatten(1), behind, dims=1))
