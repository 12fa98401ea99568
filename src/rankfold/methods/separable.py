"""Spatially separable convolutions: along one axis of the kernel, then along the other.

Scheme 2 of Jaderberg, Vedaldi, Zisserman: Speeding up convolutional neural networks with low rank
expansions. BMVC 2014. Its best fit to a weight is a singular value decomposition (Tai, Xiao, Wang,
E: Convolutional neural networks with low-rank regularization. ICLR 2016, theorem 1); AIMET calls it
spatial SVD. In the metric of patches there is no closed form for both factors together: from the
best fit in a simpler metric on they are improved in turn, Jaderberg's data reconstruction.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import nn

from rankfold.layers import (
    Convolution,
    SeparableConvolution,
    assign_factors,
    check_ranks,
    separable_limit,
)
from rankfold.methods.method import (
    Rank,
    Spectrum,
    aligned_ranks,
    check_alignment,
    why_not_spatial,
)
from rankfold.methods.moments import Moments
from rankfold.methods.separated import Separated, separate, squared_errors


@dataclass(frozen=True)
class Separable:
    """K ≈ Σ_r horizontal[:, r] ⊗ vertical[r]: kx1 in→r, then 1xk r→out.

    Takes ungrouped 2-D and 3-D convolutions whose kernel is longer than 1 along two axes.
    """

    name: ClassVar[str] = "separable"
    alignment: int = 8

    def __post_init__(self) -> None:
        check_alignment(self.alignment)

    def why_not(self, layer: nn.Module) -> str | None:
        return why_not_spatial(layer, axes=2)

    def fit(self, layer: Convolution, moments: Moments) -> "SeparableFamily":
        return SeparableFamily(layer, separate(layer, moments), self.alignment)

    def skeleton(self, layer: Convolution, rank: Rank) -> nn.Sequential:
        check_ranks(rank, (separable_limit(layer),), layer)
        return SeparableConvolution(layer, rank[0], device="meta")


@dataclass(frozen=True)
class SeparableFamily:
    """All truncations of one singular value decomposition; the one that is built is refined."""

    layer: Convolution
    separated: Separated
    alignment: int

    @property
    def spectra(self) -> Sequence[Spectrum]:
        return (self.separated.spectrum,)

    @property
    def _full(self) -> int:
        return len(self.separated.vertical)

    def ranks(self) -> Sequence[Rank]:
        return [(rank,) for rank in aligned_ranks(self._full, self.alignment)]

    @cached_property
    def _losses(self) -> torch.Tensor:
        """Of each rank from 1 on: (full rank,)."""
        lost = squared_errors(self.separated)
        return self.separated.moments.loss_of(lost, self.separated.weight)

    def loss(self, rank: Rank) -> float:
        """That of the vertical filters of the SVD; `build` goes on to refine them."""
        check_ranks(rank, (self._full,), self.layer)
        return self._losses[rank[0] - 1].item()

    def build(self, rank: Rank) -> nn.Sequential:
        check_ranks(rank, (self._full,), self.layer)
        form = SeparableConvolution(self.layer, rank[0], device="meta")
        assign_factors(form, self.separated.refined(rank[0]), self.layer)
        return form
