"""Layers of few factors to write networks with, made and called as torch's own are.

Low rank from the start: Tai, Xiao, Wang, E: Convolutional neural networks with low-rank
regularization. ICLR 2016. They put a batch norm behind each of the factors: there are twice as many
layers for gradients to vanish or explode in.
"""

from collections.abc import Iterable
from typing import Any, Literal, cast

import torch
from torch import nn

from rankfold.errors import ModelError
from rankfold.layers.chain import Convolution
from rankfold.layers.chain_norm import squared_norm_of_chain
from rankfold.layers.flattened import FlattenedConvolution
from rankfold.layers.linked import LinkedConvolution
from rankfold.layers.separable import SeparableConvolution
from rankfold.layers.two_factor import TwoFactorConvolution, TwoFactorLinear

Sizes = int | tuple[int, int]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class LowRankLinear(TwoFactorLinear):
    """`Linear(in, rank, bias=False)`, `Linear(rank, out)`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """With initial values for training; raises RankError for a rank outside 1..min(in, out)."""
        dense = nn.Linear(in_features, out_features, bias, "meta", dtype)
        super().__init__(dense, rank, device or torch.get_default_device())
        self.reset_parameters()

    def reset_parameters(self, gain: float = 1.0) -> None:
        """Random factors whose weight has entries of mean square gain² / in; zero bias.

        So outputs have the scale of the inputs; behind a ReLU with a gain of √2 (He et al. 2015).
        """
        _reset_links(self, gain)


class _TrainedConvolution(LinkedConvolution):
    """A chain with initial values for training, and perhaps a batch norm behind its first link."""

    def _prepare(self, batch_norm: bool) -> None:
        if batch_norm:
            weight = cast(Convolution, self[0]).weight
            norm = nn.BatchNorm2d(len(weight), device=weight.device, dtype=weight.dtype)
            self.insert(1, norm)
        self.reset_parameters()

    def reset_parameters(self, gain: float = 1.0) -> None:
        """Random factors whose weight has entries of mean square gain² / (in * kernel size).

        So outputs have the scale of the inputs; behind a ReLU with a gain of √2 (He et al. 2015).
        Behind a batch norm it is that of the last factor alone, and outputs have the mean square
        gain², whatever the inputs. Biases are zero.
        """
        links = [one for one in self if not isinstance(one, nn.BatchNorm2d)]
        if len(links) == len(self):
            _reset_links(links, gain)
            return
        first, last = links
        cast(nn.BatchNorm2d, self[1]).reset_parameters()
        _reset_links([first], 1.0)
        _reset_links([last], gain)

    def to_dense(self) -> Convolution:
        """The `nn.Conv2d` that this represents; raises ModelError if there is a batch norm."""
        if any(isinstance(one, nn.BatchNorm2d) for one in self):
            raise ModelError(
                "no convolution does what one with a batch norm between its factors does; "
                "rankfold.fold_batch_norms makes the batch norm part of the first factor"
            )
        return super().to_dense()


class LowRankConv2d(_TrainedConvolution, TwoFactorConvolution):
    """`Conv k in→rank (stride, padding, dilation)`, `Conv 1x1 rank→out`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        rank: int,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        batch_norm: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """With initial values for training, and a batch norm between the two if that is asked for.

        Raises RankError for a rank outside 1..min(out, in * kernel size).
        """
        geometry = (kernel_size, stride, padding, dilation)
        dense = _convolution(in_channels, out_channels, *geometry, bias, padding_mode, dtype)
        super().__init__(dense, rank, device or torch.get_default_device())
        self._prepare(batch_norm)


class SeparableConv2d(_TrainedConvolution, SeparableConvolution):
    """`Conv kx1 in→rank`, `Conv 1xk rank→out`, each with the stride and padding of its axis."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        rank: int,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        batch_norm: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """With initial values for training, and a batch norm between the two if that is asked for.

        Raises RankError for a rank outside 1..min(in * vertical, out * horizontal length).
        """
        geometry = (kernel_size, stride, padding, dilation)
        dense = _convolution(in_channels, out_channels, *geometry, bias, padding_mode, dtype)
        super().__init__(dense, rank, device or torch.get_default_device())
        self._prepare(batch_norm)


class FlattenedConv2d(_TrainedConvolution, FlattenedConvolution):
    """`Conv 1x1 in→out`, depthwise `kx1`, depthwise `1xk` (Jin et al. 2015)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """With initial values for training."""
        geometry = (kernel_size, stride, padding, dilation)
        dense = _convolution(in_channels, out_channels, *geometry, bias, padding_mode, dtype)
        super().__init__(dense, device or torch.get_default_device())
        self._prepare(batch_norm=False)


def _convolution(
    inputs: int,
    outputs: int,
    kernel_size: Sizes,
    stride: Sizes,
    padding: Sizes | str,
    dilation: Sizes,
    bias: bool,
    padding_mode: PaddingMode,
    dtype: torch.dtype | None,
) -> nn.Conv2d:
    """What a chain takes its geometry from."""
    return nn.Conv2d(
        inputs,
        outputs,
        kernel_size,
        stride,
        padding,
        dilation,
        bias=bias,
        padding_mode=padding_mode,
        device="meta",
        dtype=dtype,
    )


@torch.no_grad()
def _reset_links(links: Iterable[Any], gain: float) -> None:
    """Random weights whose product's entries have the mean square gain² / inputs; zero biases.

    Independent factors give this on average alone: so every filter has the same norm, which of few
    places (depthwise ones) differ much, and factors are scaled by the norm of what they give.
    """
    made = list(links)
    for one in made:
        nn.init.normal_(one.weight)
        filters = one.weight.flatten(1)
        filters /= filters.norm(dim=1, keepdim=True)
        if one.bias is not None:
            nn.init.zeros_(one.bias)
    pairs = [(one.weight.double(), getattr(one, "groups", 1)) for one in made]
    ratio = gain**2 * len(made[-1].weight) / squared_norm_of_chain(pairs)
    for one in made:
        one.weight.mul_(ratio ** (0.5 / len(made)))
