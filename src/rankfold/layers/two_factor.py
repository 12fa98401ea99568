"""A layer as two: the first to `rank` features, the last to all outputs."""

from typing import cast

import torch
from torch import nn

from rankfold.layers.chain import Convolution, all_axes, link
from rankfold.layers.form import check_ranks, fill_dense
from rankfold.layers.linked import LinkedConvolution


class TwoFactorLinear(nn.Sequential):
    """`Linear(in, rank, bias=False)` then `Linear(rank, out)`: W ≈ second.weight first.weight."""

    def __init__(
        self, layer: nn.Linear, rank: int, device: torch.device | str | None = None
    ) -> None:
        """The shape, bias and dtype of `layer`, with torch's initial values; on `device`, or its.

        Raises RankError for a rank outside 1..min(in, out).
        """
        check_ranks((rank,), (min(layer.in_features, layer.out_features),), layer)
        device, dtype = device or layer.weight.device, layer.weight.dtype
        super().__init__(
            nn.Linear(layer.in_features, rank, bias=False, device=device, dtype=dtype),
            nn.Linear(rank, layer.out_features, layer.bias is not None, device, dtype),
        )

    def to_dense(self) -> nn.Linear:
        """The `nn.Linear` that this represents."""
        first, last = cast(nn.Linear, self[0]), cast(nn.Linear, self[1])
        dense = nn.Linear(
            first.in_features, last.out_features, last.bias is not None, "meta", first.weight.dtype
        )
        fill_dense(dense, last.weight @ first.weight, self)
        return dense


class TwoFactorConvolution(LinkedConvolution):
    """`Conv k in→rank (stride, padding, dilation)` then `Conv 1x1 rank→out`.

    Kim et al. 2016 (Tucker-1) for first layers; Zhang et al. 2016 for any.
    """

    def __init__(
        self, layer: Convolution, rank: int, device: torch.device | str | None = None
    ) -> None:
        """The geometry, bias and dtype of `layer`, with torch's initial values.

        On `device`, or that of `layer`. Raises RankError for a rank outside
        1..min(out, in * kernel size).
        """
        check_ranks((rank,), (min(layer.out_channels, layer.weight[0].numel()),), layer)
        bias = layer.bias is not None
        super().__init__(
            link(layer, layer.in_channels, rank, all_axes(layer), device=device),
            link(layer, rank, layer.out_channels, bias=bias, device=device),
        )
