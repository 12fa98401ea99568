"""A convolution as any chain of links, each with some axes of the kernel to itself, or none."""

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import nn

from rankfold.layers.chain import Convolution, dense_convolution


class LinkedConvolution(nn.Sequential):
    """Convolutions with nothing between them, no two of which share an axis of the kernel."""

    def __init__(self, links: Iterable[Convolution]) -> None:
        super().__init__(*links)

    def to_dense(self) -> Convolution:
        """The `nn.Conv1d`, `2d` or `3d` that this represents."""
        links = [cast(Convolution, one) for one in self]
        weight = multiply_out([one.weight for one in links], [one.groups for one in links])
        return dense_convolution(self, weight)


def multiply_out(weights: Sequence[torch.Tensor], groups: Sequence[int]) -> torch.Tensor:
    """The weight (out, in, *kernel) of a chain of ungrouped, grouped and depthwise links.

    Each weight is (out, in / groups, *kernel), the first link's first, and that link ungrouped.
    """
    product = weights[0]
    for weight, parts in zip(weights[1:], groups[1:], strict=True):
        # Along an axis of the kernel all but one link are 1 wide: there they broadcast.
        if parts == len(weight) and parts == len(product):  # depthwise
            product = weight * product
        else:
            blocks, before = (one.unflatten(0, (parts, -1)) for one in (weight, product))
            product = torch.einsum("gqp...,gpi...->gqi...", blocks, before).flatten(0, 1)
    return product
