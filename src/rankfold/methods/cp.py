"""Canonical polyadic decomposition of a convolution's kernel: a sum of rank-one terms.

Lebedev, Ganin, Rakhuba, Oseledets, Lempitsky: Speeding-up convolutional neural networks using
fine-tuned CP-decomposition. ICLR 2015: by nonlinear least squares, one mode for each axis. With the
error-preserving correction of Phan et al.: Stable low-rank tensor decomposition for compression of
convolutional neural network. ECCV 2020: without it terms that cancel each other grow, and the layer
cannot be fine-tuned.
"""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import ClassVar

import torch
from torch import nn

from rankfold.decompose import CP, Weights, cp, error_preserving_correction
from rankfold.decompose.cp import from_factors, khatri_rao
from rankfold.decompose.decomposition import working_precision
from rankfold.layers import (
    Convolution,
    CPConvolution,
    CPLinear,
    TensorNetworkLinear,
    assign_factors,
    check_ranks,
    cp_limit,
    cp_modes,
)
from rankfold.methods.alternating import Factors
from rankfold.methods.method import Rank, aligned_ranks, check_alignment, why_not_spatial
from rankfold.methods.moments import Moments
from rankfold.methods.refit import improved_last_factor
from rankfold.methods.sampled import SampledFamily
from rankfold.methods.tensor_network import (
    linear_form,
    linear_modes,
    network_family,
    why_not_split,
)
from rankfold.methods.whitened import WhitenedKernel

# Sweeps of alternating least squares of a fit whose loss is an estimate, and of the correction.
_SWEEPS = 20
# Steps of nonlinear least squares from there on of the fit that is built: six times as many lower
# the error of real kernels by some five percent.
_ITERATIONS = 15
_IMPROVEMENT = 1e-4
# Of each side of a linear layer.
_MODES = 2
# Share of the error that is given for terms that do not cancel each other.
_CORRECTION = 0.005


@dataclass(frozen=True)
class CanonicalPolyadic:
    """K ≈ Σ_r out_r ∘ in_r ∘ filter_r: 1x1 in→r, depthwise k, 1x1 r→out.

    The kernel's axes are one mode. Takes ungrouped convolutions with a kernel larger than 1x1 and
    more than one channel on both sides, and linear layers: each side is split into two modes. The
    form shrinks the work between channels most, and leaves
    it to memory: a rank is worth what the clock says. An approximate method: of ranks that cost
    less than the dense layer none is exact in general, and fits find local optima.
    """

    name: ClassVar[str] = "cp"
    separable: ClassVar[bool] = False
    alignment: int = 8

    def __post_init__(self) -> None:
        check_alignment(self.alignment)

    def why_not(self, layer: nn.Module) -> str | None:
        if type(layer) is nn.Linear and not self.separable:
            return why_not_split(layer)
        return why_not_spatial(layer, 2 if self.separable else 1, channels=2)

    def fit(self, layer: nn.Linear | Convolution, moments: Moments) -> SampledFamily:
        if isinstance(layer, nn.Linear):
            ranks = aligned_ranks(_limit(layer), self.alignment)
            return network_family(layer, moments, partial(_linear, layer), _start, list(ranks))
        fit = _Fit(layer, moments, self.separable)
        return SampledFamily(
            layer,
            moments,
            [(rank,) for rank in ranks_that_save(fit.tensor, self.alignment)],
            (cp_limit(layer, self.separable),),
            fit.refined,
            fit.drafted,
        )

    def skeleton(self, layer: nn.Linear | Convolution, rank: Rank) -> nn.Module:
        if isinstance(layer, nn.Linear):
            check_ranks(rank, (_limit(layer),), layer)
            return _linear(layer, rank)
        return _form(layer, rank, self.separable)


@dataclass(frozen=True)
class SeparableCanonicalPolyadic(CanonicalPolyadic):
    """K ≈ Σ_r out_r ∘ in_r ∘ v_r ∘ h_r: 1x1 in→r, depthwise kx1, depthwise 1xk, 1x1 r→out.

    As Lebedev et al. 2015 have it, with a mode for each axis of the kernel longer than 1, of which
    there must be two. Cheaper than "cp" where kernels are large.
    """

    name: ClassVar[str] = "cp-separable"
    separable: ClassVar[bool] = True


def _form(layer: Convolution, rank: Rank, separable: bool) -> CPConvolution:
    check_ranks(rank, (cp_limit(layer, separable),), layer)
    return CPConvolution(layer, rank[0], separable, device="meta")


def _linear(layer: nn.Linear, rank: Rank) -> CPLinear:
    return linear_form(CPLinear, layer, rank[0], modes=_MODES)


def _limit(layer: nn.Linear) -> int:
    """The number of terms that hold every weight: one for each line along the longest mode."""
    given, made = linear_modes(layer, _MODES)
    return layer.weight.numel() // max(*given, *made)


def _start(
    form: TensorNetworkLinear, tensor: torch.Tensor, weights: Weights | None
) -> list[Factors]:
    rank = form.lengths[form.terms[0][-1]]
    found = cp(
        tensor,
        rank,
        algorithm="als",
        iterations=_SWEEPS,
        improvement=_IMPROVEMENT,
        weights=weights,
    )
    return [found.balanced()]


def ranks_that_save(tensor: torch.Tensor, alignment: int) -> list[int]:
    """The aligned ranks with fewer parameters than the tensor, and the exact one."""
    exact = tensor.numel() // max(tensor.shape)
    saving = (tensor.numel() - 1) // sum(tensor.shape)
    return [r for r in aligned_ranks(exact, alignment) if r <= saving or r == exact]


def drafted_terms(tensor: torch.Tensor, rank: int) -> CP:
    """Near enough for an estimate of the loss."""
    return cp(tensor, rank, algorithm="als", iterations=_SWEEPS, improvement=_IMPROVEMENT)


def refined_terms(tensor: torch.Tensor, rank: int) -> CP:
    """From the draft on by nonlinear least squares; then terms that do not cancel each other."""
    draft = drafted_terms(tensor, rank)
    if rank == tensor.numel() // max(tensor.shape):
        return draft  # exact
    found = cp(tensor, rank, start=draft, iterations=_ITERATIONS, improvement=_IMPROVEMENT)
    # No more than that of the draft, whose loss was promised.
    error = min((1 + _CORRECTION) * found.relative_error(tensor), draft.relative_error(tensor))
    return error_preserving_correction(found, tensor, error=error, iterations=_SWEEPS)


@dataclass(frozen=True, eq=False)
class _Fit(WhitenedKernel):
    """The terms of one kernel: in the metric of channels, then the outputs in that of patches."""

    separable: bool

    @cached_property
    def tensor(self) -> torch.Tensor:
        """With one mode for each depthwise link: (out, in, places, ...), float64."""
        weight = working_precision(self.layer.weight.detach()).double()
        return weight.reshape(cp_modes(self.layer, self.separable))

    def drafted(self, rank: Rank) -> CPConvolution:
        return self._form_of(drafted_terms(self.whitened, rank[0]))

    def refined(self, rank: Rank) -> CPConvolution:
        return self._form_of(refined_terms(self.whitened, rank[0]))

    def _form_of(self, found: CP) -> CPConvolution:
        rank = found.ranks[0]
        outputs, inputs, *filters = (
            self.whitening.restore(factor, mode) for mode, factor in enumerate(found.balanced())
        )
        features = khatri_rao([inputs, *filters]).mT.reshape(rank, *self.tensor.shape[1:])
        last = improved_last_factor(self.tensor, outputs, features, self.moments)
        last, first, *filters = from_factors([last, inputs, *filters]).balanced()
        form = CPConvolution(self.layer, rank, self.separable, device="meta")
        assign_factors(form, (first.mT, *(one.mT for one in filters), last), self.layer)
        return form
