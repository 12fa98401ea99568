"""Tucker-2 decomposition of a convolution's channel modes.

Kim, Park, Yoo, Choi, Yang, Shin: Compression of deep convolutional neural networks for fast and low
power mobile applications. ICLR 2016.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import ClassVar

import torch
from torch import nn

from rankfold.decompose import Tucker, tucker
from rankfold.layers import (
    CONVOLUTIONS,
    Convolution,
    TuckerConvolution,
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

CHANNEL_MODES = (0, 1)  # of a weight (out, in, *kernel)


@dataclass(frozen=True)
class Tucker2:
    """K ≈ core x_out U_out x_in U_in: 1x1 in→r_in, kxk r_in→r_out, 1x1 r_out→out.

    Takes ungrouped convolutions with a kernel larger than 1x1 and at least two aligned ranks of
    input channels. Ranks are (r_out, r_in).
    """

    name: ClassVar[str] = "tucker2"
    alignment: int = 8

    def __post_init__(self) -> None:
        check_alignment(self.alignment)

    def why_not(self, layer: nn.Module) -> str | None:
        if not isinstance(layer, CONVOLUTIONS) or type(layer) not in CONVOLUTIONS:
            return f"no factorization for {type(layer).__name__} layers"
        if layer.weight.numel() == 0:
            return "its weight is empty"
        if layer.groups != 1:
            return f"grouped convolution, groups={layer.groups}"
        if layer.weight[0, 0].numel() == 1:
            return "a 1x1 kernel has no spatial modes to keep apart: svd serves it"
        if layer.in_channels < 2 * self.alignment:
            return f"only {layer.in_channels} input channels to reduce: svd serves it"
        return None

    def fit(self, layer: Convolution, moments: Moments) -> "Tucker2Family":
        weight_metric_only(self, moments)
        return Tucker2Family(
            layer, tucker(layer.weight.detach(), modes=CHANNEL_MODES), self.alignment
        )

    def skeleton(self, layer: Convolution, rank: Rank) -> nn.Sequential:
        return TuckerConvolution(layer, rank, device="meta")


@dataclass(frozen=True)
class Tucker2Family:
    """All truncations of one HOSVD; the one that is built is refined by HOOI."""

    layer: Convolution
    hosvd: Tucker  # at full rank
    alignment: int

    @property
    def spectra(self) -> Sequence[Spectrum]:
        core = self.hosvd.core.double()
        spectra = []
        for mode in CHANNEL_MODES:
            # The core of an HOSVD is all-orthogonal: its slices' norms are the singular values.
            norms = torch.linalg.vector_norm(core.movedim(mode, 0).flatten(1), dim=1)
            sides = (core.shape[mode], core.numel() // core.shape[mode])
            spectra.append(Spectrum(norms.sort(descending=True).values[: min(sides)], sides))
        return spectra

    def ranks(self) -> Sequence[Rank]:
        return list(product(*(aligned_ranks(limit, self.alignment) for limit in self.hosvd.ranks)))

    @cached_property
    def _lost(self) -> torch.Tensor:
        """Share of the energy outside each leading block of the core: (out, in), ending in 0."""
        energy = self.hosvd.core.double().square().flatten(2).sum(2)
        kept = energy.cumsum(0).cumsum(1)
        lost = (kept[-1, -1] - kept).clamp_min(0)
        return (lost / kept[-1, -1].clamp_min(torch.finfo(torch.float64).tiny)).cpu()

    def loss(self, rank: Rank) -> float:
        """That of the truncated HOSVD: an upper bound, since `build` goes on to refine it."""
        check_ranks(rank, self.hosvd.ranks, self.layer)
        return self._lost[rank[0] - 1, rank[1] - 1].item()

    def build(self, rank: Rank) -> nn.Sequential:
        form = TuckerConvolution(self.layer, rank, device="meta")
        fitted = tucker(self.layer.weight.detach(), rank, CHANNEL_MODES)
        outputs, inputs = fitted.factors
        assign_factors(form, (inputs.mT, fitted.core, outputs), self.layer)
        return form
