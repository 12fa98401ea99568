"""Spatially separable convolutions with fewer channels: kx1, 1xk, 1x1.

"Asymmetric (3d)" of Zhang, Zou, He, Sun: Accelerating very deep convolutional networks for
classification and detection. IEEE TPAMI 38, 2016: the spatial decomposition of
Jaderberg et al. 2014, then that of the channels of its second convolution.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from rankfold.decompose.matrix import leading_eigenvectors
from rankfold.layers import Convolution, SeparableBottleneck, assign_factors, check_ranks
from rankfold.methods.alternating import Factors, lowered
from rankfold.methods.method import Rank, Spectrum, aligned_ranks, check_alignment, why_not_spatial
from rankfold.methods.moments import Moments
from rankfold.methods.refit import tail
from rankfold.methods.separated import (
    Features,
    Filters,
    Separated,
    balanced,
    separate,
    squared_errors,
)

# Numbers of vertical filters for which the outputs' spectrum is computed.
_PROBES = 12


@dataclass(frozen=True)
class Separable3:
    """Kx1 in→r_1, 1xk r_1→r_2, 1x1 r_2→out. Ranks are (r_1, r_2).

    Takes ungrouped 2-D and 3-D convolutions whose kernel is longer than 1 along two axes.
    """

    name: ClassVar[str] = "separable3"
    alignment: int = 8

    def __post_init__(self) -> None:
        check_alignment(self.alignment)

    def why_not(self, layer: nn.Module) -> str | None:
        return why_not_spatial(layer, axes=2)

    def fit(self, layer: Convolution, moments: Moments) -> "Separable3Family":
        return Separable3Family(layer, separate(layer, moments), self.alignment)

    def skeleton(self, layer: Convolution, rank: Rank) -> nn.Sequential:
        return SeparableBottleneck(layer, rank, device="meta")


@dataclass(frozen=True)
class Separable3Family:
    """All truncations of the vertical filters, and of what the outputs then are made of."""

    layer: Convolution
    separated: Separated
    alignment: int

    @property
    def _limits(self) -> Rank:
        weight = self.separated.weight
        return len(self.separated.vertical), min(len(weight), weight[0].numel())

    @property
    def spectra(self) -> Sequence[Spectrum]:
        outputs, inputs, vertical, horizontal = self.separated.weight.shape
        squares = self._output_squares(self._limits[0])[: self._limits[1]]
        return (
            self.separated.spectrum,
            Spectrum(squares.sqrt(), (outputs, inputs * vertical * horizontal)),
        )

    def ranks(self) -> Sequence[Rank]:
        return list(product(*(aligned_ranks(limit, self.alignment) for limit in self._limits)))

    def _output_squares(self, vertical: int) -> torch.Tensor:
        """Squared singular values of the best map of so many vertical filters to the outputs."""
        responses = self.separated.responses[:vertical].flatten(0, 1)
        return leading_eigenvectors(responses.mT @ responses)[0]

    @cached_property
    def _losses(self) -> torch.Tensor:
        """Of each pair of ranks.

        The error of r_1 vertical filters alone is known, and what r_2 cuts off the outputs for some
        r_1; it grows with r_1, so that the next known one bounds it.
        """
        full, fewest = self._limits
        known = np.unique(np.geomspace(1, full, _PROBES).round().astype(int)).tolist()
        tails = [tail(self._output_squares(rank))[:fewest] for rank in known]
        following = torch.from_numpy(np.searchsorted(known, np.arange(1, full + 1)))
        cut = torch.stack(tails)[following.to(tails[0].device)]
        lost = squared_errors(self.separated)[:, None] + cut
        moments, weight = self.separated.moments, self.separated.weight
        return moments.loss_of(lost.cummin(0).values, weight)

    def loss(self, rank: Rank) -> float:
        """That of the vertical filters of the SVD, or a bound; `build` goes on to refine them."""
        check_ranks(rank, self._limits, self.layer)
        return self._losses[rank[0] - 1, rank[1] - 1].item()

    def build(self, rank: Rank) -> nn.Sequential:
        form = SeparableBottleneck(self.layer, rank, device="meta")
        assign_factors(form, _refined(self.separated, *rank), self.layer)
        return form


@dataclass(frozen=True, eq=False)
class _Bottleneck:
    """Filters whose horizontal ones (out, r_1, *) are products of `last` and `horizontal`."""

    filters: Filters
    horizontal: torch.Tensor  # (r_2, r_1, *)
    last: torch.Tensor  # (out, r_2)


def _refined(separated: Separated, between: int, outputs: int) -> Factors:
    """Vertical (r_1, in, *), horizontal (r_2, r_1, *) and last factor (out, r_2)."""

    def best_after(vertical: torch.Tensor, start: torch.Tensor) -> _Bottleneck:
        features = separated.features(vertical)
        horizontal, last = _best_after(separated, features, start, outputs)
        both = torch.tensordot(last, horizontal, dims=1)
        return _Bottleneck(separated.filters(features, both), horizontal, last)

    def sweep(found: _Bottleneck) -> _Bottleneck:
        return best_after(separated.better_vertical(found.filters), found.filters.horizontal)

    start = best_after(separated.vertical[:between], separated.horizontal[:, :between])
    found = lowered(start, sweep, lambda one: separated.squared_error(one.filters), separated.whole)
    horizontal, last = balanced(found.horizontal, found.last[..., None])
    return *balanced(found.filters.vertical, horizontal), last


def _best_after(
    separated: Separated, features: Features, start: torch.Tensor, outputs: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The horizontal filters (r_2, r_1, *) and the last factor (out, r_2) that are best.

    For given vertical filters this is a matrix problem with a closed form: the horizontal filters
    to all outputs by least squares, and of these the truncated SVD in the metric.
    """
    weight, moments = separated.weight, separated.moments
    whole = features.best_horizontal(weight, start)
    identity = torch.eye(len(weight)).to(weight)
    root, inverse = moments.output_roots or (identity, identity)
    turned = root @ whole.flatten(1)
    energy = turned @ features.gram @ turned.mT
    vectors = leading_eigenvectors((energy + energy.mT) / 2)[1][:, :outputs]
    return (vectors.mT @ turned).reshape(outputs, *whole.shape[1:]), inverse @ vectors
