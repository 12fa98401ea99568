"""Singular value decomposition of a linear layer, or of a convolution seen as one.

The two-factor form: Denton et al. 2014 and Kim et al. 2016 (section 3.1, first and fully connected
layers) for the weight metric. The error-minimising truncation is Eckart and Young's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import nn

from rankfold.decompose import SVD, svd
from rankfold.layers import (
    CONVOLUTIONS,
    Dense,
    TwoFactorConvolution,
    TwoFactorLinear,
    assign_factors,
    check_ranks,
)
from rankfold.methods.method import (
    Moments,
    Rank,
    Spectrum,
    aligned_ranks,
    check_alignment,
    weight_metric_only,
)


@dataclass(frozen=True)
class LowRank:
    """W, unfolded to (out, in * kernel size), as two factors of one rank.

    Takes linear layers and ungrouped convolutions of any kernel. For many input channels and a
    large kernel Tucker-2 has a second rank to spend; for the first layers of a network, whose input
    channels are few, and for 1x1 kernels this is the method.
    """

    name: ClassVar[str] = "svd"
    alignment: int = 8

    def __post_init__(self) -> None:
        check_alignment(self.alignment)

    def why_not(self, layer: nn.Module) -> str | None:
        if not isinstance(layer, Dense) or type(layer) not in (nn.Linear, *CONVOLUTIONS):
            return f"no factorization for {type(layer).__name__} layers"
        if layer.weight.numel() == 0:
            return "its weight is empty"
        groups = getattr(layer, "groups", 1)
        return None if groups == 1 else f"grouped convolution, groups={groups}"

    def fit(self, layer: Dense, moments: Moments) -> "LowRankFamily":
        weight_metric_only(self, moments)
        weight = layer.weight.detach().flatten(1)
        return LowRankFamily(layer, svd(weight), self.alignment)

    def skeleton(self, layer: Dense, rank: Rank) -> nn.Sequential:
        return _form(layer, rank)


@dataclass(frozen=True)
class LowRankFamily:
    """All truncations of one singular value decomposition."""

    layer: Dense
    decomposition: SVD
    alignment: int

    @property
    def spectra(self) -> Sequence[Spectrum]:
        rows, columns = self.decomposition.u.shape[0], self.decomposition.vh.shape[1]
        return (Spectrum(self.decomposition.singular_values.double(), (rows, columns)),)

    def ranks(self) -> Sequence[Rank]:
        limit = self.decomposition.ranks[0]
        return [(rank,) for rank in aligned_ranks(limit, self.alignment)]

    @cached_property
    def _lost(self) -> torch.Tensor:
        """Share of the energy beyond each rank: (full rank + 1,), from 1 to 0."""
        energy = self.decomposition.singular_values.double().square()
        beyond = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])
        return (beyond / beyond[0].clamp_min(torch.finfo(torch.float64).tiny)).cpu()

    def loss(self, rank: Rank) -> float:
        check_ranks(rank, self.decomposition.ranks, self.layer)
        return self._lost[rank[0]].item()

    def build(self, rank: Rank) -> nn.Sequential:
        form = _form(self.layer, rank)
        left, right = self.decomposition.truncate(*rank).balanced()
        assign_factors(form, (right, left), self.layer)
        return form


def _form(layer: Dense, rank: Rank) -> nn.Sequential:
    check_ranks(rank, (min(layer.weight.flatten(1).shape),), layer)
    if isinstance(layer, nn.Linear):
        return TwoFactorLinear(layer, rank[0], device="meta")
    return TwoFactorConvolution(layer, rank[0], device="meta")
