"""Predicted losses checked against measured ones, layer by layer, and corrected by them.

The prediction is a quadratic model and takes layers for independent of each other: good for small
errors, and off by a factor that differs from layer to layer. A few measured points of each layer
give that factor.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy

from rankfold.analysis.candidates import Candidate
from rankfold.knapsack import undominated
from rankfold.methods import Rank

# Shares of a layer's MACs at which its prediction is checked.
SHARES = (0.5, 0.2)
_LEAST = 1e-12  # a measured divergence below this is rounding


@dataclass(frozen=True)
class Check:
    """One layer replaced, the others as they are: the divergence as predicted and as measured."""

    layer: str
    method: str
    rank: Rank
    predicted: float
    measured: float


def points_to_check(candidates: Sequence[Candidate], macs: int) -> list[Candidate]:
    """Candidates of a layer that are best for their MACs, near the shares of the dense ones."""
    if not candidates:
        return []
    losses = np.array([candidate.loss for candidate in candidates])
    costs = np.array([[float(candidate.macs)] for candidate in candidates])
    best = [candidates[index] for index in undominated(losses, costs)]
    found = [min(best, key=lambda c: abs(c.macs - share * macs)) for share in SHARES]
    return list(dict.fromkeys(found))


def spread(points: Sequence[Sequence[Candidate]], most: int) -> list[list[Candidate]]:
    """Of the points of all layers so many at most, evenly: rather one of each than all of some."""
    every = [(layer, point) for layer, found in enumerate(points) for point in found]
    count = min(most, len(every))
    kept: list[list[Candidate]] = [[] for _ in points]
    for index in range(count):
        layer, point = every[index * len(every) // count]
        kept[layer].append(point)
    return kept


def typical_factor(checks: Sequence[Check]) -> float:
    """The median of measured over predicted; 1 without checks."""
    found = [measured - predicted for predicted, measured in _logarithms(checks)]
    return math.exp(float(np.median(found))) if found else 1.0


def _logarithms(checks: Sequence[Check]) -> list[tuple[float, float]]:
    """Of predicted and measured, where that is finite, ascending."""
    return sorted(
        (math.log(max(check.predicted, _LEAST)), math.log(max(check.measured, _LEAST)))
        for check in checks
        if math.isfinite(check.measured)
    )


def corrected(
    candidates: Sequence[Candidate], checks: Sequence[Check], typical: float = 1.0
) -> list[Candidate]:
    """The candidates of one layer with losses that agree with what was measured.

    Between the checked points the logarithm of the loss is interpolated, beyond them it keeps the
    nearest one's factor: a map that never turns the order of two candidates round. Without points
    the factor is the `typical` one.
    """
    points = _logarithms(checks)
    if not points:
        return [replace(candidate, loss=typical * candidate.loss) for candidate in candidates]
    known, true = np.array(points).T
    true = np.maximum.accumulate(true)
    logs = np.log([max(candidate.loss, _LEAST) for candidate in candidates])
    found = np.interp(logs, known, true)
    found += np.minimum(logs - known[0], 0) + np.maximum(logs - known[-1], 0)
    return [
        replace(candidate, loss=math.exp(loss) if candidate.loss > 0 else 0.0)
        for candidate, loss in zip(candidates, found, strict=True)
    ]


def agreement(checks: Sequence[Check]) -> float:
    """Spearman's rank correlation of predicted and measured; NaN for fewer than three checks."""
    if len(checks) < 3:
        return math.nan
    predicted = [check.predicted for check in checks]
    return float(scipy.stats.spearmanr(predicted, [check.measured for check in checks]).statistic)
