"""Tucker-2 of the channels, then canonical polyadic decomposition of the core (TKD-CPD).

Phan, Sobolev, Sozykin, Ermilov, Gusak, Tichavsky, Glukhov, Oseledets, Cichocki: Stable low-rank
tensor decomposition for compression of convolutional neural network. ECCV 2020, section 3.
"""

from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import torch
from torch import nn

from rankfold.decompose import CP, tucker
from rankfold.layers import (
    Convolution,
    TuckerCPConvolution,
    assign_factors,
    tucker_cp_limits,
)
from rankfold.methods.cp import drafted_terms, ranks_that_save, refined_terms
from rankfold.methods.method import Rank, aligned_ranks, check_alignment, why_not_spatial
from rankfold.methods.moments import Moments
from rankfold.methods.refit import improved_last_factor, of_equal_norms
from rankfold.methods.sampled import SampledFamily
from rankfold.methods.whitened import CHANNELS, WhitenedKernel


@dataclass(frozen=True)
class TuckerCP:
    """1x1 in→w, 1x1 w→r, depthwise k, 1x1 r→w, 1x1 w→out, as CP of the core of Tucker-2.

    Between channels and terms there is a bottleneck, which pays where the terms are many: from and
    to the channels they cost r (in + out), through it r (w + w) + w (in + out). Without it, w being
    all channels, this is "cp" with two needless links; with no more terms than r = w they could
    have been had from the channels directly. Ranks are (r, w): one width for both sides, of which
    the side with fewer channels has no more than those. Takes what "cp" takes.
    """

    name: ClassVar[str] = "tucker-cp"
    alignment: int = 8

    def __post_init__(self) -> None:
        check_alignment(self.alignment)

    def why_not(self, layer: nn.Module) -> str | None:
        return why_not_spatial(layer, channels=2)

    def fit(self, layer: Convolution, moments: Moments) -> SampledFamily:
        fit = _Fit(layer, moments)
        limits = tucker_cp_limits(layer)
        terms = ranks_that_save(fit.tensor, self.alignment)
        widths = aligned_ranks(limits[1], self.alignment)
        return SampledFamily(
            layer, moments, list(product(terms, widths)), limits, fit.refined, fit.drafted
        )

    def skeleton(self, layer: Convolution, rank: Rank) -> nn.Sequential:
        return TuckerCPConvolution(layer, rank, device="meta")


@dataclass(frozen=True, eq=False)
class _Fit(WhitenedKernel):
    """One kernel: in the metric of channels, then the last factor in that of patches."""

    def drafted(self, rank: Rank) -> TuckerCPConvolution:
        return self._form(rank, refine=False)

    def refined(self, rank: Rank) -> TuckerCPConvolution:
        return self._form(rank, refine=True)

    def _form(self, rank: Rank, refine: bool) -> TuckerCPConvolution:
        form = TuckerCPConvolution(self.layer, rank, device="meta")
        widths = [min(rank[1], self.tensor.shape[mode]) for mode in CHANNELS]
        compressed = tucker(self.whitened, widths, CHANNELS)
        core = compressed.core
        # A small core has fewer terms at which it is exact than there may be; the others are zero.
        terms = min(rank[0], core.numel() // max(core.shape))
        found = (refined_terms if refine else drafted_terms)(core, terms)
        into, out_of, filters = _padded(found, rank[0])
        outputs, inputs = (
            self.whitening.restore(factor, mode)
            for mode, factor in zip(CHANNELS, compressed.factors, strict=True)
        )
        features = torch.einsum("qr,ir,pr->qip", into, inputs @ out_of, filters)
        last = improved_last_factor(self.tensor, outputs, features, self.moments)
        factors = of_equal_norms([inputs.mT, out_of.mT, filters.mT, into, last])
        assign_factors(form, factors, self.layer)
        return form


def _padded(found: CP, rank: int) -> list[torch.Tensor]:
    missing = rank - found.ranks[0]
    return [nn.functional.pad(factor, (0, missing)) for factor in found.balanced()]
