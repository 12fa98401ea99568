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

from rankfold.layers.form import fill_dense

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

    What is 1 long goes with what it stands before, at the end with what it stands behind; of a
    pointwise kernel all axes are one group.
    """
    groups: list[tuple[int, ...]] = [()]
    for axis, length in enumerate(layer.kernel_size):
        if length > 1 and any(layer.kernel_size[before] > 1 for before in groups[-1]):
            groups.append(())
        groups[-1] += (axis,)
    return groups


def dense_convolution(form: nn.Sequential, weight: torch.Tensor) -> Convolution:
    """The convolution of this weight (out, in, *kernel) that a chain of links represents."""
    links = [cast(Any, module) for module in form]
    texts = [one.padding for one in links if isinstance(one.padding, str)]
    modes = [one.padding_mode for one in links if one.padding_mode != "zeros"]

    def combined(name: str, combine: Callable[[Any], int]) -> Any:
        along_axes = zip(*(getattr(one, name) for one in links), strict=True)
        return tuple(combine(values) for values in along_axes)

    dense = type(links[0])(
        weight.shape[1],
        weight.shape[0],
        tuple(weight.shape[2:]),
        combined("stride", math.prod),
        texts[0] if texts else combined("padding", sum),
        combined("dilation", max),
        bias=links[-1].bias is not None,
        padding_mode=modes[0] if modes else "zeros",
        device="meta",
        dtype=weight.dtype,
    )
    fill_dense(dense, weight, form)
    return dense
