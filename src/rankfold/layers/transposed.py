"""A transposed convolution as a chain: that of the convolution it is the adjoint of, backwards.

`ConvTranspose` of inputs to outputs is the adjoint of the `Conv` of outputs to inputs with the same
weight tensor, so where that one is F_n ... F_1, this one is F_1ᵀ ... F_nᵀ.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from rankfold.layers.chain import Convolution, combined_geometry, kernel_of
from rankfold.layers.form import fill_dense

Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# The geometry of a link, along an axis, that another link owns.
_OF_NO_AXIS = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}


class TransposedConvolution(nn.Sequential):
    """The adjoints of the links of a chain, the last link's first.

    A link that owns an axis becomes a `ConvTranspose` with the same weight, and takes the output
    padding along that axis; a pointwise one becomes a `Conv 1x1` of the transposed matrix, which
    runs faster.
    """

    def __init__(self, chain: nn.Sequential, layer: Transposed) -> None:
        """The adjoint of a chain on the meta device, with the output padding and bias of `layer`.

        The chain is of convolutions of the outputs of `layer` to its inputs.
        """
        super().__init__()
        self.kind, self.groups = type(layer), layer.groups
        left = list(layer.output_padding)  # along the axes that no link has taken yet
        for one in reversed(cast("list[Convolution]", list(chain))):
            bias = layer.bias is not None and one is chain[0]
            owned = [axis for axis in range(len(left)) if _owns(one, axis)]
            make, geometry = type(one), {}
            if owned:
                make = cast(Any, type(layer))
                geometry = {name: getattr(one, name) for name in _OF_NO_AXIS}
                geometry["output_padding"] = tuple(
                    left[axis] if axis in owned else 0 for axis in range(len(left))
                )
                left = [0 if axis in owned else value for axis, value in enumerate(left)]
            link = cast(Any, make)(
                one.out_channels,
                one.in_channels,
                **({"kernel_size": 1} | geometry),
                groups=one.groups,
                bias=bias,
                device="meta",
                dtype=one.weight.dtype,
            )
            link.weight.requires_grad_(one.weight.requires_grad)
            self.append(link)

    def to_dense(self) -> Transposed:
        """The `nn.ConvTranspose1d`, `2d` or `3d` that this represents."""
        links: list[Any] = list(self)
        weights = [
            (one.weight if isinstance(one, TRANSPOSED) else adjoint(one.weight, one.groups))
            for one in links
        ]
        forwards = [(w, one.groups) for w, one in zip(weights, links, strict=True)][::-1]
        weight = kernel_of(forwards, self.groups)
        dense = cast(Any, self.kind)(
            weight.shape[0],
            weight.shape[1] * self.groups,
            tuple(weight.shape[2:]),
            **combined_geometry(links),
            groups=self.groups,
            bias=links[-1].bias is not None,
            device="meta",
            dtype=weight.dtype,
        )
        fill_dense(dense, weight, self)
        return dense


def adjoint_weights(
    weights: Sequence[torch.Tensor], form: TransposedConvolution
) -> list[torch.Tensor]:
    """The weights of the links of a chain as those of its adjoint form, in the form's order."""
    links: list[Any] = list(form)
    return [
        weight if isinstance(one, TRANSPOSED) else adjoint(weight, one.groups)
        for one, weight in zip(links, reversed(weights), strict=True)
    ]


def adjoint(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """Each group's matrix transposed, of a pointwise weight (out, in / groups, 1, ...)."""
    by_group = weight.reshape(groups, -1, weight.shape[1]).mT
    return by_group.reshape(-1, by_group.shape[2], *weight.shape[2:])


def _owns(one: Convolution, axis: int) -> bool:
    return any(getattr(one, name)[axis] != value for name, value in _OF_NO_AXIS.items())
