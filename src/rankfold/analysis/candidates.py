"""Everything that may become of one layer: method, rank, loss and cost."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from torch import nn

from rankfold.analysis.latency import LayerTiming
from rankfold.cost import count_layer_macs, count_parameters
from rankfold.methods import (
    WEIGHT_METRIC,
    Family,
    Method,
    Moments,
    Rank,
    Spectrum,
    reduction,
)

Counts = tuple[int, int]  # parameters, MACs over all calls


@dataclass(frozen=True)
class Candidate:
    """One approximation of one layer."""

    method: str
    rank: Rank
    loss: float
    parameters: int
    macs: int  # over all calls of the layer on the first calibration batch


@dataclass(frozen=True)
class AnalysedLayer:
    """One layer with a weight, and all that can be made of it."""

    name: str
    layer: str  # its repr
    parameters: int
    macs: int  # over all calls on the first calibration batch
    reason: str | None  # why no method applies, or None
    methods: Mapping[str, Method]  # those that apply, in the order of METHODS
    spectra: Mapping[str, tuple[Spectrum, ...]]  # of the weight's unfoldings, by method
    candidates: tuple[Candidate, ...]  # below break-even
    grids: Mapping[str, tuple[tuple[int, ...], ...]]  # by method: per entry of a rank, its values
    moments: Moments = WEIGHT_METRIC  # the metric that the candidates are fitted in
    element_size: int = 4  # bytes of one parameter
    timing: LayerTiming | None = None


def grid_of(family: Family) -> tuple[tuple[int, ...], ...]:
    """For each entry of the family's ranks, the values it takes, ascending."""
    return tuple(tuple(sorted(set(entry))) for entry in zip(*family.ranks(), strict=True))


def below_break_even(
    layer: nn.Module,
    method: Method,
    ranks: Sequence[Rank],
    input_shapes: Sequence[Sequence[int]],
    dense: Counts,
) -> dict[Rank, Counts]:
    """The ranks of one method that pay, and what they cost.

    That is no more parameters and no more MACs than the dense layer, and fewer of one.
    """

    def count(rank: Rank) -> Counts:
        skeleton = reduction.skeleton(method, layer, rank)
        return count_parameters(skeleton), count_layer_macs(skeleton, input_shapes)

    return {
        rank: cost
        for rank, cost in zip(ranks, costs_of_ranks(count, ranks), strict=True)
        if cost != dense and all(ours <= theirs for ours, theirs in zip(cost, dense, strict=True))
    }


def costs_of_ranks(count: Callable[[Rank], Counts], ranks: Sequence[Rank]) -> list[Counts]:
    """The cost of every rank, counting few of them.

    A chain of factors costs a sum of products of its ranks, each at most once per product, so the
    cost is multilinear: counted at the corners of the grid it is known in between. Two counts
    inside the grid check that it is; where it is not, every rank is counted.
    """
    bounds = [(min(entry), max(entry)) for entry in zip(*ranks, strict=True)]
    corners = {corner: count(corner) for corner in product(*(sorted(set(b)) for b in bounds))}

    def interpolate(rank: Rank) -> Counts:
        parameters = macs = 0.0
        for corner, (corner_parameters, corner_macs) in corners.items():
            weight = 1.0
            for entry, at, (low, high) in zip(rank, corner, bounds, strict=True):
                if low != high:
                    weight *= (entry - low if at == high else high - entry) / (high - low)
            parameters += weight * corner_parameters
            macs += weight * corner_macs
        return round(parameters), round(macs)

    probes = {ranks[len(ranks) // 2], ranks[len(ranks) // 3]} - corners.keys()
    if all(count(probe) == interpolate(probe) for probe in probes):
        return [interpolate(rank) for rank in ranks]
    return [count(rank) for rank in ranks]
