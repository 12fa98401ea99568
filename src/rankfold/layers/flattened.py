"""Convolutions of filters that are products of vectors, one along each axis."""

import math
from typing import cast

import torch
from torch import nn

from rankfold.layers.chain import Convolution, axis_groups, link
from rankfold.layers.linked import LinkedConvolution


class FlattenedConvolution(LinkedConvolution):
    """`Conv 1x1 in→out`, then for each axis of the kernel a depthwise convolution along it.

    The form of Jin, Dundar, Culurciello: Flattened convolutional neural networks for feedforward
    acceleration. ICLR 2015 (workshop). It is a way to train a network from scratch:
    `FlattenedConvolution(nn.Conv2d(64, 128, 3, padding=1))` stands where the convolution would.
    """

    def __init__(self, layer: Convolution, device: torch.device | str | None = None) -> None:
        """The geometry, bias and dtype of `layer`; on `device`, or that of `layer`.

        The initial values of the first link are torch's, those of the depthwise ones keep the
        variance: together that of the weight of a new dense layer, as torch draws it.
        """
        outputs, groups = layer.out_channels, axis_groups(layer)
        super().__init__(
            link(layer, layer.in_channels, outputs, device=device),
            *(
                link(
                    layer,
                    outputs,
                    outputs,
                    axes,
                    groups=outputs,
                    bias=layer.bias is not None and axes is groups[-1],
                    device=device,
                )
                for axes in groups
            ),
        )
        for depthwise in list(self)[1:]:
            kernel = cast(Convolution, depthwise)
            bound = math.sqrt(3 / math.prod(kernel.kernel_size))
            nn.init.uniform_(kernel.weight, -bound, bound)
