"""The links that convolutions are made of when they become a chain of thinner ones.

Of the axes of the kernel each belongs to one link, which has the kernel size, stride, padding and
dilation of the dense layer along it and is 1 wide along the others. All links but the last are
without a bias, so that padding them is padding the input: zero, reflected, replicated and circular
padding all commute with a map of the channels and with what is done along another axis.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn

from rankfold.layers.form import factors_of, fill_dense

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def link(
    layer: Convolution,
    inputs: int,
    outputs: int,
    axes: Sequence[int] = (),
    *,
    groups: int = 1,
    bias: bool = False,
    device: torch.device | str | None = None,
) -> Convolution:
    """A convolution of `inputs` to `outputs` channels with the geometry of `layer` along `axes`.

    Axes count from 0, the first of the kernel; without any it is pointwise (1x1). Dtype and, if no
    `device` is given, the device are those of `layer`.
    """

    def along(values: Any, otherwise: int) -> Any:
        if isinstance(values, str):  # "same" and "valid"
            return values if axes else 0
        return tuple(v if axis in axes else otherwise for axis, v in enumerate(values))

    return type(layer)(
        inputs,
        outputs,
        along(layer.kernel_size, 1),
        along(layer.stride, 1),
        along(layer.padding, 0),
        along(layer.dilation, 1),
        groups,
        bias,
        layer.padding_mode if axes else "zeros",
        device=device or layer.weight.device,
        dtype=layer.weight.dtype,
    )


def all_axes(layer: Convolution) -> tuple[int, ...]:
    """Those of the kernel: 0 to its dimension less 1."""
    return tuple(range(len(layer.kernel_size)))


def axis_groups(layer: Convolution) -> list[tuple[int, ...]]:
    """The axes of the kernel, neighbours together, so that one of each group is longer than 1.

    What is 1 long goes with the axes before it, at the start with the one after; of a pointwise
    kernel all axes are one group.
    """
    groups: list[tuple[int, ...]] = [()]
    for axis, length in enumerate(layer.kernel_size):
        if length > 1 and any(layer.kernel_size[before] > 1 for before in groups[-1]):
            groups.append(())
        groups[-1] += (axis,)
    return groups


def kernel_of(links: Sequence[tuple[torch.Tensor, int]], copies: int = 1) -> torch.Tensor:
    """The weight (out, in / copies, *kernel) of `copies` chains of links, side by side as one.

    Of each link, the first one first, its weight (out, in / groups, *kernel) and its groups.
    """
    (first, groups), *others = links
    blocks = first.unflatten(0, (copies, groups // copies, -1))
    apart = torch.eye(groups // copies, dtype=first.dtype, device=first.device)
    found = torch.einsum("gaom...,ab->gaobm...", blocks, apart).flatten(3, 4).flatten(0, 2)
    for weight, groups in others:
        blocks, before = (one.unflatten(0, (groups, -1)) for one in (weight, found))
        # Along an axis of the kernel, all links but its owner are 1 wide: there they broadcast.
        if blocks.shape[2] == 1:
            found = (blocks * before).flatten(0, 1)
        else:
            found = torch.einsum("gom...,gmi...->goi...", blocks, before).flatten(0, 1)
    return found


def combined_geometry(links: Sequence[Any]) -> dict[str, Any]:
    """Stride, padding, dilation (and output padding) of the layer that a chain represents."""

    def combined(name: str, combine: Callable[[Any], int]) -> Any:
        along_axes = zip(*(getattr(one, name) for one in links), strict=True)
        return tuple(combine(values) for values in along_axes)

    texts = [one.padding for one in links if isinstance(one.padding, str)]
    geometry = {
        "stride": combined("stride", math.prod),
        "padding": texts[0] if texts else combined("padding", sum),
        "dilation": combined("dilation", max),
    }
    if any(one.transposed for one in links):
        geometry["output_padding"] = combined("output_padding", sum)
    return geometry


def dense_convolution(form: nn.Sequential, weight: torch.Tensor, groups: int = 1) -> Convolution:
    """The convolution of this weight (out, in / groups, *kernel) that a chain represents.

    Its last module holds the bias.
    """
    links = factors_of(form)
    modes = [one.padding_mode for one in links if one.padding_mode != "zeros"]
    dense = type(links[0])(
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        **combined_geometry(links),
        groups=groups,
        bias=cast(Any, form[-1]).bias is not None,
        padding_mode=modes[0] if modes else "zeros",
        device="meta",
        dtype=weight.dtype,
    )
    fill_dense(dense, weight, form)
    return dense
