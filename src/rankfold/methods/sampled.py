"""A family whose members are not slices of one decomposition: each rank is fitted by itself.

Fitting every candidate would take too long, so a few are, their losses are measured, and between
them the loss is interpolated; the one that the plan chooses is fitted when it is built. Each rank
saves less than the one before, so that the chord between two losses lies above those in between.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import scipy
import torch
from torch import nn

from rankfold.layers import Convolution, Dense, check_ranks
from rankfold.methods.method import Rank, Spectrum
from rankfold.methods.moments import Moments

# Values tried of each entry of a rank, by the number of entries; 2 for more.
_TRIED = {1: 8, 2: 4}
# Significant digits of a measured error: iterations amplify the rounding of a product, which is not
# the same each time, and a plan should be.
_DIGITS = 4


@dataclass(frozen=True)
class SampledFamily:
    """All approximations of one layer of which each is fitted by `make`, when it is asked for."""

    layer: Dense | Convolution
    moments: Moments
    candidates: Sequence[Rank]  # a full grid, up to `limits`
    limits: Rank
    make: Callable[[Rank], nn.Module]  # a fitted form with `to_dense()`
    draft: Callable[[Rank], nn.Module] | None = None
    """A faster fit, no better than that of `make`, whose losses are measured in its place."""
    exact: bool = False
    """Whether nothing is lost at the limits: there the loss need not be measured."""
    _made: dict[Rank, nn.Module] = field(default_factory=dict, repr=False, compare=False)

    @property
    def spectra(self) -> Sequence[Spectrum]:
        return ()

    def ranks(self) -> Sequence[Rank]:
        return self.candidates

    def build(self, rank: Rank) -> nn.Module:
        check_ranks(rank, self.limits, self.layer)
        if rank not in self._made:
            self._made[rank] = self.make(rank)
        return copy.deepcopy(self._made[rank])

    def loss(self, rank: Rank) -> float:
        """Measured at a few ranks, interpolated between them; never growing."""
        check_ranks(rank, self.limits, self.layer)
        interpolate = self._losses
        point = [
            np.clip(entry, axis[0], axis[-1])
            for entry, axis in zip(rank, interpolate.grid, strict=True)
        ]
        return interpolate(point).item()

    @cached_property
    def _losses(self) -> Any:
        """Through the losses at the ranks tried."""
        axes = []
        for entry in zip(*self.candidates, strict=True):
            values = sorted(set(entry))
            wanted = np.geomspace(values[0], values[-1], _TRIED.get(len(self.limits), 2))
            axes.append(sorted({min(values, key=lambda v: abs(v - one)) for one in wanted}))
        table = np.empty([len(values) for values in axes])
        for place in np.ndindex(*table.shape):
            table[place] = self._measure(tuple(a[i] for a, i in zip(axes, place, strict=True)))
        for axis in range(table.ndim):
            table = np.minimum.accumulate(table, axis)
        return scipy.interpolate.RegularGridInterpolator(
            [np.array(values, float) for values in axes], table
        )

    def _measure(self, rank: Rank) -> float:
        if self.exact and rank == self.limits:
            return 0.0
        weight = self.layer.weight.detach()
        form: Any = self.build(rank) if self.draft is None else self.draft(rank)
        with torch.no_grad():
            difference = form.to_dense().weight.double() - weight.double()
        share = self.moments.squared_error(difference) / self._whole if self._whole > 0 else 0.0
        error = float(f"{share:.{_DIGITS}g}") * self._whole
        return self._in_loss.loss_of(error, weight).item()

    @cached_property
    def _whole(self) -> float:
        """The squared error of nothing at all."""
        return self.moments.squared_error(self.layer.weight.detach())

    @cached_property
    def _in_loss(self) -> Moments:
        """The metric with its scale known."""
        if self.moments.scale is not None:
            return self.moments
        return replace(self.moments, scale=1 / self._whole if self._whole > 0 else 0.0)
