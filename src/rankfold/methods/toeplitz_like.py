"""Toeplitz-like matrices of small displacement rank, for linear layers.

Sindhwani, Sainath, Kumar: Structured transforms for small-footprint deep learning. NeurIPS 2015.
The displacement Z₁ W - W Z₋₁ of a matrix determines it, and one of rank r gives r products of a
circulant and a skew-circulant matrix (theorem 2.2 there; Pan: Structured matrices and polynomials.
2001). A truncated displacement is a start: what is lost with it is amplified where the frequencies
of both sides are near.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import nn

from rankfold.decompose import svd
from rankfold.decompose.decomposition import working_precision
from rankfold.layers import ToeplitzLikeLinear, assign_factors, check_ranks, square_size
from rankfold.layers.toeplitz_like import between_domains, twist_of, weight_of_spectra
from rankfold.methods.alternating import damped_cholesky, improve
from rankfold.methods.method import Rank, check_alignment, why_not_dense
from rankfold.methods.moments import WEIGHT_METRIC, Moments
from rankfold.methods.refit import of_equal_norms
from rankfold.methods.sampled import SampledFamily

# Turns of a fit whose loss is an estimate, and of the one built.
_DRAFT, _TURNS = 8, 40
_IMPROVEMENT = 1e-3  # share of the squared error: less ends the turns
# Of the candidates but the last: transforms of so many terms take longer than the dense product.
_GREATEST = 32
_EXACT = 1e-20  # share of the weight's square that is rounding

Factors = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class ToeplitzLike:
    """W ≈ Σ_j Z₁(g_j) Z₋₁(h_j): a circulant and a skew-circulant matrix for each term.

    Takes linear layers. The rank is the number of terms, the displacement rank; of a square whose
    corner the weight is, it can be as great as the size of that. The order of a trained layer's
    features means nothing, so that its error is larger than that of `svd`: it suits training best.

    Starts from the truncated displacement of the weight, then alternating least squares, in the
    weight metric first. Finds local optima. Candidates are all ranks up to 32, and the greatest.
    """

    name: ClassVar[str] = "toeplitz-like"
    alignment: int = 8

    def __post_init__(self) -> None:
        check_alignment(self.alignment)

    def why_not(self, layer: nn.Module) -> str | None:
        return why_not_dense(layer, (nn.Linear,))

    def fit(self, layer: nn.Linear, moments: Moments) -> SampledFamily:
        fit = _Fit(layer, working_precision(layer.weight.detach()).double(), moments)
        saving = (fit.weight.numel() - 1) // (2 * fit.size)
        most = min(saving, _GREATEST, fit.size - 1)
        ranks = [*range(1, most + 1), fit.size]
        candidates = [(rank,) for rank in ranks]
        return SampledFamily(layer, moments, candidates, (fit.size,), fit.refined, fit.drafted)

    def skeleton(self, layer: nn.Linear, rank: Rank) -> nn.ModuleList:
        return _form(layer, rank)


def _form(layer: nn.Linear, rank: Rank) -> ToeplitzLikeLinear:
    sides, bias = (layer.in_features, layer.out_features), layer.bias is not None
    check_ranks(rank, (square_size(*sides),), layer)
    return ToeplitzLikeLinear(*sides, rank[0], bias, "meta", layer.weight.dtype)


@dataclass(frozen=True, eq=False)
class _Fit:
    """The sums of products that are near one weight, in a metric."""

    layer: nn.Linear
    weight: torch.Tensor  # (out, in), float64
    moments: Moments

    @property
    def size(self) -> int:
        return square_size(self.layer.in_features, self.layer.out_features)

    def drafted(self, rank: Rank) -> ToeplitzLikeLinear:
        return self._fitted(rank, _DRAFT)

    def refined(self, rank: Rank) -> ToeplitzLikeLinear:
        return self._fitted(rank, _TURNS)

    def _fitted(self, rank: Rank, turns: int) -> ToeplitzLikeLinear:
        form = _form(self.layer, rank)
        factors = self.start[0][: rank[0]], self.start[1][: rank[0]]
        for moments in dict.fromkeys((WEIGHT_METRIC, self.moments)):
            factors = self._alternate(factors, moments, turns)
        assign_factors(form, of_equal_norms(factors), self.layer)
        return form

    @cached_property
    def start(self) -> Factors:
        """All terms of the weight in the corner of zeros, those of the greatest first."""
        rows, columns = self.weight.shape
        square = nn.functional.pad(self.weight, (0, self.size - columns, 0, self.size - rows))
        shifted = torch.cat([square[:, 1:], -square[:, :1]], 1)
        left, right = svd(square.roll(1, 0) - shifted).balanced()
        return left.mT / 2**0.5, right.flip(1) / 2**0.5

    def _alternate(self, factors: Factors, moments: Moments, turns: int) -> Factors:
        error = moments.squared_error(self._product(*factors) - self.weight)
        whole = moments.squared_error(self.weight)
        for _ in range(turns):
            if error <= _EXACT * whole:
                break
            found = self._turn(factors, moments)
            reached = moments.squared_error(self._product(*found) - self.weight)
            if not reached < error:
                break
            factors, gained, error = found, error - reached, reached
            if gained < _IMPROVEMENT * error:
                break
        return factors

    def _turn(self, factors: Factors, moments: Moments) -> Factors:
        """A few steps for the circulant factors, and a few for the others."""
        first, second = factors
        twist = self._twist
        seen = self._frequencies(moments.inputs, self.weight.shape[1], skew=True)
        blocks = self._gram(torch.fft.fft(second * twist), self._kernel * seen)
        first = improve(
            first,
            lambda one: self._product(one, second),
            self.weight,
            moments,
            lambda residual: _solved(blocks, torch.fft.fft(residual)).real,
        )
        seen = self._frequencies(moments.gradients, self.weight.shape[0], skew=False)
        others = self._gram(torch.fft.fft(first), self._kernel.mT * seen)
        second = improve(
            second,
            lambda one: self._product(first, one),
            self.weight,
            moments,
            lambda residual: (_solved(others, torch.fft.fft(residual * twist)) * twist.conj()).real,
        )
        return first, second

    def _product(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        spectra = torch.fft.rfft(first), torch.fft.fft(second * self._twist)
        rows, columns = self.weight.shape
        between = self._between[: self.size // 2 + 1]
        return weight_of_spectra(*spectra, self._twist, between)[:rows, :columns]

    @cached_property
    def _twist(self) -> torch.Tensor:
        return twist_of(self.size, self.size, self.weight)

    @cached_property
    def _between(self) -> torch.Tensor:
        """(size, size): what takes one domain of frequencies to the other."""
        return between_domains(self.size, self.size, self.weight)

    @cached_property
    def _kernel(self) -> torch.Tensor:
        """(size, size): its squared moduli."""
        return self._between.abs().square()

    def _frequencies(self, moment: torch.Tensor | None, length: int, skew: bool) -> torch.Tensor:
        """(size,): the diagonal of a moment in the domain of frequencies, 0 beyond its length."""
        if moment is None:
            return self.weight.new_ones(self.size)
        padding = self.size - length
        known = nn.functional.pad(moment, (0, padding, 0, padding)).to(self._twist)
        if skew:
            known = self._twist[:, None] * known * self._twist.conj()
        turned = torch.fft.ifft(torch.fft.fft(known, dim=0), dim=1)
        return turned.diagonal().real.clamp_min(0)

    def _gram(self, spectra: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        """Cholesky factors, (size, rank, rank), of what preconditions the terms' frequencies.

        Exact for a weight that fills the square, in the weight metric.
        """
        pairs = spectra.conj()[:, None] * spectra
        gram = torch.einsum("ab,jkb->ajk", kernel.to(pairs), pairs)
        return damped_cholesky(gram)


def _solved(lower: torch.Tensor, spectra: torch.Tensor) -> torch.Tensor:
    """Of the equations of each frequency, back in the time domain; all (rank, size), complex."""
    found = torch.cholesky_solve(spectra.mT[..., None], lower)[..., 0]
    return torch.fft.ifft(found.mT)
