"""A layer that gives zeros."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from rankfold.layers.chain import CONVOLUTIONS, Convolution
from rankfold.layers.transposed import TRANSPOSED, Transposed


class HollowLayer(nn.Module):
    """Zeros of the shape that a linear layer or a convolution of no weights would give.

    What is left of a residual branch that adds nothing. It reads the shape of its input alone, and
    takes what filling its outputs with zeros takes.
    """

    def __init__(self, layer: nn.Linear | Convolution | Transposed) -> None:
        """Of the outputs and the geometry of `layer`, a convolution plain, grouped or transposed.

        The device and dtype of the zeros are those of the input.
        """
        super().__init__()
        self.channels_last = isinstance(layer, nn.Linear)
        self.outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        self.axes = tuple(_axes(layer)) if isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)) else ()
        """Of each axis of the kernel (multiplied by, added, divided by) of the length along it."""
        self.train(layer.training)

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        """(..., inputs) → (..., outputs), or (..., inputs, *lengths) → (..., outputs, *lengths)."""
        if self.channels_last:
            return tensor.new_zeros((*tensor.shape[:-1], self.outputs))
        leading = tensor.shape[: tensor.dim() - len(self.axes) - 1]
        lengths = self.lengths(tensor.shape[tensor.dim() - len(self.axes) :])
        return tensor.new_zeros((*leading, self.outputs, *lengths))

    def lengths(self, given: Sequence[int]) -> list[int]:
        """Of the outputs along each axis of the kernel."""
        both = zip(given, self.axes, strict=True)
        return [(length * times + added) // by + 1 for length, (times, added, by) in both]

    def extra_repr(self) -> str:
        return f"outputs={self.outputs}"


def _axes(layer: Convolution | Transposed) -> list[tuple[int, int, int]]:
    spans = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    if isinstance(layer, TRANSPOSED):
        strides, paddings = layer.stride, cast(Any, layer).padding
        extra = cast(Any, layer).output_padding
        of_axes = zip(strides, paddings, spans, extra, strict=True)
        return [(s, d + e - s - 2 * p, 1) for s, p, d, e in of_axes]
    padding: Any = layer.padding
    if isinstance(padding, str):
        both_sides = spans if padding == "same" else [0] * len(spans)
    else:
        both_sides = [2 * one for one in padding]
    sizes = zip(layer.stride, both_sides, spans, strict=True)
    return [(1, p - d - 1, s) for s, p, d in sizes]
