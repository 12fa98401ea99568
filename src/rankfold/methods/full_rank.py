"""Full-rank factorization: a layer whose weight is of less than full rank, without loss.

Weights lose rank by weight decay, by merging, by channels that died in training. In the metric of
second moments, rank that no input or gradient of the calibration data shows does not count.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from rankfold.layers import Dense
from rankfold.methods.method import Rank
from rankfold.methods.moments import Moments
from rankfold.methods.svd import Lookup, LowRank, LowRankFamily


@dataclass(frozen=True)
class FullRank(LowRank):
    """W as two factors of its numerical rank, rounded up to the alignment: one candidate.

    In the weight metric the rank counts the singular values above max(rows, columns) times the
    machine epsilon times the largest. In another it is the least whose error is at most `tolerance`
    of the responses' norm: moments are damped, so that nothing in them is ever quite zero.
    """

    name: ClassVar[str] = "full-rank"
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance must lie in [0, 1), not {self.tolerance!r:.40}")

    def fit(self, layer: Dense | Lookup, moments: Moments) -> "FullRankFamily":
        family = super().fit(layer, moments)
        values = family.singular_values
        if moments.is_plain:
            kind = layer.weight.dtype if layer.weight.dtype == torch.float64 else torch.float32
            sides = family.left.shape[0], family.right.shape[1]
            least = max(sides) * torch.finfo(kind).eps * values[0]
            rank = int((values > least).sum())
        else:
            energy = values.square().flip(0).cumsum(0).flip(0)
            rank = int((energy > self.tolerance**2 * energy[0]).sum())
        rank = min(-(-max(rank, 1) // self.alignment) * self.alignment, len(values))
        return FullRankFamily(**vars(family), numerical_rank=rank)


@dataclass(frozen=True)
class FullRankFamily(LowRankFamily):
    """The truncations of an SVD, of which one is a candidate."""

    numerical_rank: int

    def ranks(self) -> Sequence[Rank]:
        return [(self.numerical_rank,)]
