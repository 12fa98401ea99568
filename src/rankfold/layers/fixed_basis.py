"""Convolutions by filters that are given, and are not trained."""

from typing import cast

import torch

from rankfold.layers.chain import Convolution, all_axes, link
from rankfold.layers.form import check_ranks
from rankfold.layers.linked import LinkedConvolution


class FixedBasisConvolution(LinkedConvolution):
    """Depthwise `Conv k in→in R (stride, padding, dilation)`, frozen; `Conv 1x1 in R→out`."""

    def __init__(
        self,
        layer: Convolution,
        filters: torch.Tensor,
        device: torch.device | str | None = None,
    ) -> None:
        """The geometry, bias and dtype of `layer`; the same `filters`, (R, *kernel), on each input.

        On `device`, or that of `layer`. Raises RankError for no filters, or more than the kernel
        has places.
        """
        inputs, rank = layer.in_channels, len(filters)
        check_ranks((rank,), (layer.weight[0, 0].numel(),), layer)
        bias = layer.bias is not None
        super().__init__(
            link(layer, inputs, inputs * rank, all_axes(layer), groups=inputs, device=device),
            link(layer, inputs * rank, layer.out_channels, bias=bias, device=device),
        )
        weight = cast(Convolution, self[0]).weight.requires_grad_(False)
        weight.copy_(filters.repeat(inputs, *(1 for _ in layer.kernel_size))[:, None])
