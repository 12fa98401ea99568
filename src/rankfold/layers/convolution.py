"""A convolution as a chain of thinner ones.

The spatial factor alone has the kernel, stride, padding and dilation of the dense layer. The
pointwise (1x1) factors before it have no bias, so that padding them is padding the input: zero,
reflected, replicated and circular padding all commute with a map of the channels.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from rankfold.layers.form import check_ranks, fill_dense

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class TwoFactorConvolution(nn.Sequential):
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
        super().__init__(
            _spatial(layer, layer.in_channels, rank, device),
            _pointwise(layer, rank, layer.out_channels, layer.bias is not None, device),
        )

    def to_dense(self) -> Convolution:
        """The `nn.Conv1d`, `2d` or `3d` that this represents."""
        spatial, last = cast(Convolution, self[0]), cast(Convolution, self[1])
        weight = torch.tensordot(last.weight.flatten(1), spatial.weight, dims=1)
        return _dense(spatial, weight, self)


class TuckerConvolution(nn.Sequential):
    """`Conv 1x1 in→r_in`, `Conv k r_in→r_out (stride, padding, dilation)`, `Conv 1x1 r_out→out`.

    The Tucker-2 form of Kim et al. 2016. Ranks are given as (r_out, r_in), in the order of the
    weight's modes.
    """

    def __init__(
        self,
        layer: Convolution,
        ranks: Sequence[int],
        device: torch.device | str | None = None,
    ) -> None:
        """The geometry, bias and dtype of `layer`, with torch's initial values.

        On `device`, or that of `layer`. Raises RankError for ranks outside 1..out and 1..in.
        """
        check_ranks(ranks, (layer.out_channels, layer.in_channels), layer)
        rank_out, rank_in = ranks
        super().__init__(
            _pointwise(layer, layer.in_channels, rank_in, False, device),
            _spatial(layer, rank_in, rank_out, device),
            _pointwise(layer, rank_out, layer.out_channels, layer.bias is not None, device),
        )

    def to_dense(self) -> Convolution:
        """The `nn.Conv1d`, `2d` or `3d` that this represents."""
        first, spatial, last = (cast(Convolution, factor) for factor in self)
        weight = torch.einsum(
            "oq,qp...,pi->oi...", last.weight.flatten(1), spatial.weight, first.weight.flatten(1)
        )
        return _dense(spatial, weight, self)


def _spatial(
    layer: Convolution, channels: int, rank: int, device: torch.device | str | None
) -> Convolution:
    """The factor with the kernel and the geometry of `layer`, without a bias."""
    return type(layer)(
        channels,
        rank,
        cast(Any, layer.kernel_size),
        cast(Any, layer.stride),
        cast(Any, layer.padding),
        cast(Any, layer.dilation),
        bias=False,
        padding_mode=layer.padding_mode,
        device=device or layer.weight.device,
        dtype=layer.weight.dtype,
    )


def _pointwise(
    layer: Convolution,
    channels: int,
    rank: int,
    bias: bool,
    device: torch.device | str | None,
) -> Convolution:
    return type(layer)(
        channels,
        rank,
        1,
        bias=bias,
        device=device or layer.weight.device,
        dtype=layer.weight.dtype,
    )


def _dense(spatial: Convolution, weight: torch.Tensor, form: nn.Sequential) -> Convolution:
    """The convolution with the geometry of `spatial` that `form` represents."""
    dense = type(spatial)(
        weight.shape[1],
        weight.shape[0],
        cast(Any, spatial.kernel_size),
        cast(Any, spatial.stride),
        cast(Any, spatial.padding),
        cast(Any, spatial.dilation),
        bias=form[-1].bias is not None,
        padding_mode=spatial.padding_mode,
        device="meta",
        dtype=weight.dtype,
    )
    fill_dense(dense, weight, form)
    return dense
