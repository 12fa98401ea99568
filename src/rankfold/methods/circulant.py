"""The nearest weights that are the same along their diagonals: circulant, Toeplitz, Hankel.

In the weight metric their numbers are the means of the weight's diagonals (for circulant matrices:
T. Chan, An optimal circulant preconditioner for Toeplitz systems. 1988). In any other they solve
normal equations whose matrix is a cross-correlation of the two moments, so that the best one is
found in closed form there too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from rankfold.decompose.decomposition import working_precision
from rankfold.layers import (
    CirculantLinear,
    HankelLinear,
    ToeplitzLinear,
    assign_factors,
    check_ranks,
)
from rankfold.methods.method import Rank, Spectrum, check_alignment, why_not_dense
from rankfold.methods.moments import Moments
from rankfold.methods.refit import solve


@dataclass(frozen=True)
class Circulant:
    """W[i, j] ≈ c[(i - j) mod n], n = max(in, out). Takes linear layers; there is one rank, (1,).

    The order of a trained layer's features means nothing, so its error is large: it suits training
    best.
    """

    name: ClassVar[str] = "circulant"
    form: ClassVar[type[CirculantLinear]] = CirculantLinear
    alignment: int = 8

    def __post_init__(self) -> None:
        check_alignment(self.alignment)

    def why_not(self, layer: nn.Module) -> str | None:
        return why_not_dense(layer, (nn.Linear,))

    def fit(self, layer: nn.Linear, moments: Moments) -> "DiagonalsFamily":
        weight = working_precision(layer.weight.detach()).double()
        form = self._form(layer)
        numbers = best_numbers(weight, form, moments)
        lost = moments.squared_error(weight - _placed(numbers, form))
        return DiagonalsFamily(layer, self, numbers, moments.loss_of(lost, weight).item())

    def skeleton(self, layer: nn.Linear, rank: Rank) -> nn.ModuleList:
        check_ranks(rank, (1,), layer)
        return self._form(layer)

    def _form(self, layer: nn.Linear) -> CirculantLinear:
        sides, bias = (layer.in_features, layer.out_features), layer.bias is not None
        return self.form(*sides, bias, "meta", layer.weight.dtype)


@dataclass(frozen=True)
class Toeplitz(Circulant):
    """W[i, j] ≈ t[i - j], of in + out - 1 numbers."""

    name: ClassVar[str] = "toeplitz"
    form: ClassVar[type[CirculantLinear]] = ToeplitzLinear


@dataclass(frozen=True)
class Hankel(Circulant):
    """W[i, j] ≈ h[i + j], of in + out - 1 numbers."""

    name: ClassVar[str] = "hankel"
    form: ClassVar[type[CirculantLinear]] = HankelLinear


@dataclass(frozen=True)
class DiagonalsFamily:
    """The one weight of a kind."""

    layer: nn.Linear
    method: Circulant
    numbers: torch.Tensor = field(repr=False)  # (period,), float64
    only_loss: float

    @property
    def spectra(self) -> Sequence[Spectrum]:
        return ()

    def ranks(self) -> Sequence[Rank]:
        return [(1,)]

    def loss(self, rank: Rank) -> float:
        check_ranks(rank, (1,), self.layer)
        return self.only_loss

    def build(self, rank: Rank) -> nn.ModuleList:
        form = self.method.skeleton(self.layer, rank)
        assign_factors(form, [self.numbers], self.layer)
        return form


def best_numbers(weight: torch.Tensor, form: CirculantLinear, moments: Moments) -> torch.Tensor:
    """The numbers (period,), float64, of the weight of this form that is nearest to `weight`."""
    if isinstance(form, HankelLinear):  # a Toeplitz matrix of the inputs turned round
        weight = weight.flip(1)
        inputs = None if moments.inputs is None else moments.inputs.flip(0, 1)
        moments = Moments(inputs, moments.gradients)
    along = _diagonals(form, weight.device)
    if moments.is_plain:
        return _sums(weight, along, form.period) / _sums(
            torch.ones_like(weight), along, form.period
        )
    seen = moments.times_gradients(moments.times_inputs(weight))
    gram = _normal_matrix(form, moments).to(weight)
    return solve(gram, _sums(seen, along, form.period)[None])[0]


def _normal_matrix(form: CirculantLinear, moments: Moments) -> torch.Tensor:
    """(period, period): entry (s, t) is the sum of G[s + j, t + l] A[j, l] over all j and l.

    Of indices modulo the period, where a moment is 0 behind its end.
    """
    sides = (moments.gradients, form.out_features), (moments.inputs, form.in_features)
    gradients, inputs = (
        torch.fft.fft2(_identity(length) if moment is None else moment, (form.period,) * 2)
        for moment, length in sides
    )
    found = torch.fft.ifft2(gradients * inputs.conj().to(gradients.device)).real
    return (found + found.mT) / 2


def _identity(length: int) -> torch.Tensor:
    return torch.eye(length, dtype=torch.float64)


def _diagonals(form: CirculantLinear, device: torch.device) -> torch.Tensor:
    """(out, in): the number that each entry of the weight is."""
    rows = torch.arange(form.out_features, device=device)[:, None]
    return (rows - torch.arange(form.in_features, device=device)) % form.period


def _sums(matrix: torch.Tensor, along: torch.Tensor, period: int) -> torch.Tensor:
    return matrix.new_zeros(period).index_add(0, along.flatten(), matrix.flatten())


def _placed(numbers: torch.Tensor, form: CirculantLinear) -> torch.Tensor:
    weight = numbers[_diagonals(form, numbers.device)]
    return weight.flip(1) if isinstance(form, HankelLinear) else weight
