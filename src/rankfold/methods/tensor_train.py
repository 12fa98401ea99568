"""Tensor-train decomposition of a convolution's kernel, with the inputs first, the outputs last.

Oseledets: Tensor-train decomposition. SIAM Journal on Scientific Computing 33 (2011), section 2.
With the channels split into several modes as well it is `tensorized_train`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import ClassVar, cast

import numpy as np
import torch
from torch import nn

from rankfold.decompose import Weights, tensor_train
from rankfold.decompose.decomposition import working_precision
from rankfold.decompose.matrix import leading_eigenvectors
from rankfold.decompose.unfolding import gram
from rankfold.decompose.weights import Whitening
from rankfold.layers import (
    Convolution,
    TensorTrainConvolution,
    assign_factors,
    check_ranks,
    train_limits,
    train_modes,
)
from rankfold.methods.method import (
    Rank,
    Spectrum,
    aligned_ranks,
    check_alignment,
    why_not_spatial,
)
from rankfold.methods.moments import Moments
from rankfold.methods.refit import improved_last_factor, of_equal_norms

# Values of each rank that are candidates, by the number of ranks.
_VALUES = {3: 12, 4: 6}
# Shares of full rank at which the error in the metric of patches is measured.
_PROBES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)


@dataclass(frozen=True)
class TensorTrain:
    """K ≈ in[r1] v[r1, r2] h[r2, r3] out[r3]: 1x1 in→r1, kx1 r1→r2, 1xk r2→r3, 1x1 r3→out.

    A separable convolution between two maps of the channels. Takes ungrouped convolutions whose
    kernel is longer than 1 along two axes: along one alone it would be Tucker-2.
    """

    name: ClassVar[str] = "tensor-train"
    alignment: int = 8

    def __post_init__(self) -> None:
        check_alignment(self.alignment)

    def why_not(self, layer: nn.Module) -> str | None:
        return why_not_spatial(layer, axes=2, channels=2)

    def fit(self, layer: Convolution, moments: Moments) -> "TensorTrainFamily":
        weight = working_precision(layer.weight.detach()).double()
        tensor = weight.movedim(0, -1).reshape(train_modes(layer))
        whitened = Whitening.of(tensor.shape, _weights(tensor, moments)).whiten(tensor)
        return TensorTrainFamily(layer, tensor, _spectra(whitened), moments, self.alignment)

    def skeleton(self, layer: Convolution, rank: Rank) -> nn.Sequential:
        return TensorTrainConvolution(layer, rank, device="meta")


@dataclass(frozen=True, eq=False)
class TensorTrainFamily:
    """All truncations of the unfoldings of one kernel, by TT-SVD in the metric of channels.

    Where the moment of whole patches is known the map to the outputs is then the best in its
    metric, and the losses are corrected by errors measured in it.
    """

    layer: Convolution
    tensor: torch.Tensor  # (in, *kernel, out), float64
    spectra: Sequence[Spectrum]  # of the whitened tensor's unfoldings
    moments: Moments
    alignment: int

    @property
    def _limits(self) -> Rank:
        return train_limits(self.layer)

    def ranks(self) -> Sequence[Rank]:
        """A grid whose values grow geometrically: of all there would be too many."""
        count = _VALUES.get(len(self._limits), 4)
        return list(product(*(_spaced(n, self.alignment, count) for n in self._limits)))

    def loss(self, rank: Rank) -> float:
        """The sum of what each truncation alone costs: no less than all of them together.

        So it is in the metric of channels (Oseledets 2011, theorem 2.2); in that of patches it is
        scaled to be so at the ranks measured.
        """
        check_ranks(rank, self._limits, self.layer)
        lost = sum(tail[r - 1] for tail, r in zip(self._tails, rank, strict=True))
        return min(lost, self._whole)

    def build(self, rank: Rank) -> nn.Sequential:
        form = TensorTrainConvolution(self.layer, rank, device="meta")
        assign_factors(form, self._factors(rank), self.layer)
        return form

    @cached_property
    def _whole(self) -> float:
        weight = self.layer.weight.detach()
        return self.moments.loss_of(self.moments.squared_error(weight), weight).item()

    @cached_property
    def _tails(self) -> list[np.ndarray]:
        """Of each entry of a rank, its loss at each value from 1 on, never growing."""
        weight = self.layer.weight.detach()
        tails = []
        for spectrum in self.spectra:
            squares = spectrum.singular_values.square().flip(0)
            beyond = squares.cumsum(0).flip(0)
            kept = torch.cat([beyond[1:], beyond.new_zeros(1)])
            tails.append(self.moments.loss_of(kept, weight).numpy())
        if self.moments.of_channels(self.layer.in_channels) is self.moments:
            return tails
        corrected = [self._corrected(entry, tail) for entry, tail in enumerate(tails)]
        excess = [1.0]
        for share in _PROBES:
            rank = tuple(max(1, round(share * limit)) for limit in self._limits)
            expected = sum(tail[r - 1] for tail, r in zip(corrected, rank, strict=True))
            excess.append(self._measure(rank) / expected if expected > 0 else 1.0)
        return [max(excess) * tail for tail in corrected]

    def _corrected(self, entry: int, tail: np.ndarray) -> np.ndarray:
        """The losses of one truncation in the metric of patches: measured, ratios in between."""
        full = len(tail)
        probes = sorted({max(1, round(share * full)) for share in _PROBES})
        ratios = []
        for value in probes:
            rank = (*self._limits[:entry], value, *self._limits[entry + 1 :])
            known = tail[value - 1]
            ratios.append(self._measure(rank) / known if known > 0 else 1.0)
        return np.minimum.accumulate(tail * np.interp(np.arange(1, full + 1), probes, ratios))

    def _measure(self, rank: Rank) -> float:
        weight = self.layer.weight.detach()
        form = cast(TensorTrainConvolution, self.build(rank))
        difference = form.to_dense().weight.detach().double() - weight.double()
        return self.moments.loss_of(self.moments.squared_error(difference), weight).item()

    def _factors(self, rank: Rank) -> list[torch.Tensor]:
        """Weights of the links, of the same norms, first factor first."""
        train = tensor_train(self.tensor, rank, weights=_weights(self.tensor, self.moments))
        cores = [_padded(core, rank, k) for k, core in enumerate(train.cores)]
        features = cores[0]
        for core in cores[1:-1]:
            features = torch.tensordot(features, core, dims=1)
        weight = self.tensor.movedim(-1, 0).flatten(1)
        inputs = features.flatten(0, -2).mT.reshape(-1, *self.tensor.shape[:-1])
        last = improved_last_factor(
            weight.unflatten(1, self.tensor.shape[:-1]),
            cores[-1].flatten(1).mT,
            inputs,
            self.moments,
        )
        # A core (before, places, after) is the weight (after, before, places) of a link.
        return of_equal_norms([*(core.movedim(2, 0) for core in cores[:-1]), last])


def _weights(tensor: torch.Tensor, moments: Moments) -> Weights:
    channels = moments.of_channels(tensor.shape[0])
    known = {0: channels.inputs, tensor.dim() - 1: channels.gradients}
    return {mode: moment for mode, moment in known.items() if moment is not None}


def _spectra(tensor: torch.Tensor) -> list[Spectrum]:
    spectra = []
    for bond in range(1, tensor.dim()):
        unfolding = tensor.reshape(math.prod(tensor.shape[:bond]), -1)
        rows, columns = unfolding.shape
        wide = unfolding if rows <= columns else unfolding.mT
        squares = leading_eigenvectors(gram(wide.contiguous()))[0]
        spectra.append(Spectrum(squares.clamp_min(0).sqrt(), (rows, columns)))
    return spectra


def _spaced(limit: int, alignment: int, count: int) -> list[int]:
    """At most `count` of the aligned ranks, the first and the last among them."""
    values = aligned_ranks(limit, alignment)
    wanted = np.geomspace(values[0], values[-1], count)
    return sorted({min(values, key=lambda v: abs(v - one)) for one in wanted})


def _padded(core: torch.Tensor, rank: Rank, place: int) -> torch.Tensor:
    """With zeros where the neighbours of a rank are too small to make use of it."""
    before = rank[place - 1] if place > 0 else 1
    after = rank[place] if place < len(rank) else 1
    more = (0, after - core.shape[2], 0, 0, 0, before - core.shape[0])
    return nn.functional.pad(core, more)
