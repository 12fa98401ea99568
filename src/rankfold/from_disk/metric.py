"""The metric of the inputs that a layer is given, made with as little work as its shape allows."""

import weakref
from collections.abc import Callable
from functools import partial

import torch

from rankfold.decompose.unfolding import gram
from rankfold.methods import Moments
from rankfold.methods.svd import low_rank_factors, low_rank_factors_of_outputs

# Of the mean eigenvalue of the inputs' moment, added so that it has a root.
_DAMPING = 1e-6
_ROWS = 4096  # of inputs whose products are summed at a time

_Factors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class InputsMetric:
    """Whitened singular value decompositions of layers, one after the other.

    Layers that are given the same tensor, as queries, keys and values are, share its moment and
    the root of that; what is kept for them is let go when another tensor comes.
    """

    def __init__(self) -> None:
        self._is_last: Callable[[torch.Tensor], bool] = lambda inputs: False
        self._moments: Moments | None = None

    def factors(self, weight: torch.Tensor, inputs: torch.Tensor, rank: int) -> _Factors:
        """As `low_rank_factors` of a weight (out, in), for inputs (..., in)."""
        outputs, features = weight.shape
        known = self._moments if self._is_last(inputs) else None
        if known is None:
            self._moments = None  # first, so that two are never in memory
            if 2 * outputs <= features:
                return low_rank_factors_of_outputs(weight, _of_outputs(inputs, weight), rank)
            known = _of_inputs(inputs)
            self._moments, self._is_last = known, _identity_of(inputs)
        return low_rank_factors(weight, known, rank)


def _identity_of(tensor: torch.Tensor) -> Callable[[torch.Tensor], bool]:
    """Whether another is this very tensor, unchanged; does not keep it alive."""
    if tensor.is_inference():  # what changes it is not counted
        return lambda other: False
    return partial(_is_same, weakref.ref(tensor), tensor._version)


def _is_same(kept: weakref.ref[torch.Tensor], version: int, other: torch.Tensor) -> bool:
    return kept() is other and other._version == version


def _of_inputs(inputs: torch.Tensor) -> Moments:
    """E[x xᵀ], damped."""
    rows = inputs.reshape(-1, inputs.shape[-1])
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for part in rows.split(_ROWS):
        total += gram(part.double().mT)
    return Moments(total / max(1, len(rows))).damped(_DAMPING)


def _of_outputs(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """E[y yᵀ] of y = W x, the moment of the inputs damped as in `_of_inputs`."""
    rows, double = inputs.reshape(-1, inputs.shape[-1]), weight.double()
    total = torch.zeros(len(weight), len(weight), dtype=torch.float64)
    squares = 0.0
    for part in rows.split(_ROWS):
        wide = part.double()
        squares += wide.square().sum().item()
        total += gram(double @ wide.mT)
    mean = squares / max(1, rows.numel())
    return total / max(1, len(rows)) + _DAMPING * mean * gram(double)
