"""A few separable filters for each input channel, of which all outputs are linear combinations.

Scheme 1 of Jaderberg, Vedaldi, Zisserman: Speeding up convolutional neural networks with low rank
expansions. BMVC 2014. With one bank of filters for all channels it is that of Rigamonti, Sironi,
Lepetit, Fua: Learning separable filters. CVPR 2013, whose bank is learned with a penalty on the
nuclear norm of the filters; here the filters have rank one from the start.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import nn

from rankfold.decompose.decomposition import working_precision
from rankfold.layers import (
    Convolution,
    SeparableBasisConvolution,
    assign_factors,
    check_ranks,
    split_kernel,
)
from rankfold.methods.alternating import Factors, alternate, improve
from rankfold.methods.method import Rank, Spectrum, check_alignment, why_not_spatial
from rankfold.methods.mixture import best_mixture, errors_by_filter, mixed
from rankfold.methods.moments import Moments

_POWER_ITERATIONS = 5


@dataclass(frozen=True)
class SeparableBasis:
    """K[o, i] ≈ Σ_m a[o, i, m] s[i, m], each s of rank one: depthwise kx1, 1xk, then 1x1.

    Takes ungrouped 2-D and 3-D convolutions whose kernel is longer than 1 along two axes. The rank
    is the number of filters for each input channel; every number is a candidate, because the
    channels keep their alignment. With `shared` the filters are the same for all input channels
    (stored once for each): as costly, and nearer to what Rigamonti et al. learn.
    """

    name: ClassVar[str] = "separable-basis"
    alignment: int = 8
    shared: bool = False

    def __post_init__(self) -> None:
        check_alignment(self.alignment)
        if type(self.shared) is not bool:
            raise ValueError(f"shared is true or false, not {self.shared!r:.40}")

    def why_not(self, layer: nn.Module) -> str | None:
        return why_not_spatial(layer, axes=2)

    def fit(self, layer: Convolution, moments: Moments) -> "SeparableBasisFamily":
        weight = working_precision(split_kernel(layer)).double()
        tensors = _by_channel(weight, moments)
        if self.shared:
            tensors = tensors.flatten(0, 1)[None]
        return SeparableBasisFamily(layer, weight, *_pursue(tensors), moments)

    def skeleton(self, layer: Convolution, rank: Rank) -> nn.Sequential:
        check_ranks(rank, (math.prod(layer.kernel_size),), layer)
        return SeparableBasisConvolution(layer, rank[0], device="meta")


@dataclass(frozen=True)
class SeparableBasisFamily:
    """The leading filters of a pursuit; those of the one that is built are refined."""

    layer: Convolution
    weight: torch.Tensor  # (out, in, vertical, horizontal), float64
    vertical: torch.Tensor  # (full rank, in or 1, vertical), float64
    horizontal: torch.Tensor  # (full rank, in or 1, horizontal), float64
    moments: Moments

    @property
    def spectra(self) -> Sequence[Spectrum]:
        return ()

    def ranks(self) -> Sequence[Rank]:
        return [(rank,) for rank in range(1, len(self.vertical) + 1)]

    @cached_property
    def _losses(self) -> torch.Tensor:
        """Of each rank from 1 on: (full rank,)."""
        filters = _filters(self.vertical, self.horizontal)
        lost = errors_by_filter(self.weight.flatten(2), filters, self.moments)
        return self.moments.loss_of(lost, self.weight)

    def loss(self, rank: Rank) -> float:
        """That of the filters of the pursuit; `build` goes on to refine them."""
        check_ranks(rank, (len(self.vertical),), self.layer)
        return self._losses[rank[0] - 1].item()

    def build(self, rank: Rank) -> nn.Sequential:
        check_ranks(rank, (len(self.vertical),), self.layer)
        vertical, horizontal = self.vertical[: rank[0]], self.horizontal[: rank[0]]
        filters = _filters(vertical, horizontal)
        last = best_mixture(self.weight.flatten(2), filters, self.moments)
        vertical, horizontal, last = alternate(
            (vertical, horizontal, last), self._sweep, _kernel_of, self.weight, self.moments
        )
        inputs = self.layer.in_channels
        # (filters, in, ...) as torch counts the channels of depthwise convolutions.
        first, second = (
            filters.expand(-1, inputs, -1).movedim(0, 1) for filters in (vertical, horizontal)
        )
        form = SeparableBasisConvolution(self.layer, rank[0], device="meta")
        assign_factors(form, (first, second, last.mT), self.layer)
        return form

    def _sweep(
        self, vertical: torch.Tensor, horizontal: torch.Tensor, last: torch.Tensor
    ) -> Factors:
        """Both filters improved, and the best last factor for them."""
        weight, moments = self.weight, self.moments
        sizes = self._sizes(last)

        def precondition(residual: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            size = (sizes * other.square().sum(-1)).sum_to_size(residual.shape[:2])
            return residual / torch.where(size > 0, size, 1)[..., None]

        vertical = improve(
            vertical,
            lambda filters: _kernel_of(filters, horizontal, last),
            weight,
            moments,
            lambda residual: precondition(residual, horizontal),
        )
        horizontal = improve(
            horizontal,
            lambda filters: _kernel_of(vertical, filters, last),
            weight,
            moments,
            lambda residual: precondition(residual, vertical),
        )
        filters = _filters(vertical, horizontal)
        return vertical, horizontal, best_mixture(weight.flatten(2), filters, moments, last)

    def _sizes(self, last: torch.Tensor) -> torch.Tensor:
        """How much a change of each filter's scale counts: (filters, in)."""
        weighed = self.moments.times_gradients(last).reshape(last.shape)
        return (last * weighed).sum(0) * _variances(self.weight, self.moments)


def _kernel_of(
    vertical: torch.Tensor, horizontal: torch.Tensor, last: torch.Tensor
) -> torch.Tensor:
    """The kernel (out, in, vertical, horizontal)."""
    kernel = mixed(_filters(vertical, horizontal), last)
    return kernel.unflatten(2, (vertical.shape[2], -1))


def _filters(vertical: torch.Tensor, horizontal: torch.Tensor) -> torch.Tensor:
    """(filters, in or 1, places)."""
    return (vertical[..., None] * horizontal[:, :, None, :]).flatten(2)


def _variances(weight: torch.Tensor, moments: Moments) -> torch.Tensor:
    """The mean variance of each input channel in a patch: (in,)."""
    if moments.inputs is None:
        return weight.new_ones(weight.shape[1])
    return moments.inputs.diagonal().reshape(weight.shape[1], -1).mean(1)


def _by_channel(weight: torch.Tensor, moments: Moments) -> torch.Tensor:
    """A tensor (in, p, vertical, horizontal) with the inner products of each channel's filters.

    p is the number of places: no more filters are needed to tell in the metric what the outputs
    make of a channel.
    """
    outputs, inputs, *places = weight.shape
    weighed = moments.times_gradients(weight).reshape(outputs, inputs, -1)
    gram = torch.einsum("oip,oiq->ipq", weighed, weight.flatten(2))
    gram = gram * _variances(weight, moments)[:, None, None]
    values, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
    roots = values.clamp_min(0).sqrt()[..., None] * vectors.mT
    return roots.reshape(inputs, -1, *places)


def _pursue(tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Separable filters, (places, batch, vertical) and (places, batch, horizontal).

    For tensors (batch, p, vertical, horizontal). Each filter is the one that has the greatest part
    in what those before leave of the p slices (orthogonal matching pursuit); the part is found by
    power iterations. As many as places leave nothing.
    """
    rest = tensors
    batch, _, *places = tensors.shape
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    basis = tensors.new_zeros(batch, 0, math.prod(places))
    while len(found) < math.prod(places):
        vertical = _leading(torch.einsum("bphw,bpgw->bhg", rest, rest))
        for _ in range(_POWER_ITERATIONS):
            seen = torch.einsum("bphw,bh->bpw", rest, vertical)
            horizontal = _leading(seen.mT @ seen)
            seen = torch.einsum("bphw,bw->bph", rest, horizontal)
            vertical = _leading(seen.mT @ seen)
        found.append((vertical, horizontal))
        new = (vertical[:, :, None] * horizontal[:, None, :]).flatten(1)
        for _ in range(2):  # once more for rounding
            new = new - torch.einsum("bnp,bnq,bq->bp", basis, basis, new)
        new = nn.functional.normalize(new, dim=1)
        basis = torch.cat([basis, new[:, None]], dim=1)
        flat = rest.flatten(2)
        rest = (flat - (flat @ new[..., None]) * new[:, None]).reshape(rest.shape)
    vertical, horizontal = (torch.stack(filters) for filters in zip(*found, strict=True))
    return vertical, horizontal


def _leading(gram: torch.Tensor) -> torch.Tensor:
    """The eigenvector (batch, n) of the greatest eigenvalue."""
    return torch.linalg.eigh((gram + gram.mT) / 2).eigenvectors[..., -1]
