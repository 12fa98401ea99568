"""Convolutions by a few separable filters for each input channel, which the outputs share."""

import math

import torch

from rankfold.layers.chain import Convolution, link
from rankfold.layers.form import check_ranks
from rankfold.layers.linked import LinkedConvolution
from rankfold.layers.separable import two_groups


class SeparableBasisConvolution(LinkedConvolution):
    """Depthwise `kx1 in→in M`, depthwise `1xk in M→in M`, `Conv 1x1 in M→out`.

    Scheme 1 of Jaderberg et al. 2014: M filters for each input channel. The stride, padding and
    dilation of an axis are those of its link.
    """

    def __init__(
        self, layer: Convolution, rank: int, device: torch.device | str | None = None
    ) -> None:
        """The geometry, bias and dtype of `layer`, with torch's initial values; `rank` is M.

        On `device`, or that of `layer`. Raises RankError for a rank outside 1..kernel size.
        """
        check_ranks((rank,), (math.prod(layer.kernel_size),), layer)
        inputs, features = layer.in_channels, layer.in_channels * rank
        vertical, horizontal = two_groups(layer)
        bias = layer.bias is not None
        super().__init__(
            link(layer, inputs, features, vertical, groups=inputs, device=device),
            link(layer, features, features, horizontal, groups=features, device=device),
            link(layer, features, layer.out_channels, bias=bias, device=device),
        )
