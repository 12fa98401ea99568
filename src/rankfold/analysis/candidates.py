"""Everything that may become of one layer: method, rank, loss and cost."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from operator import gt

from torch import nn

from rankfold.analysis.latency import LayerTiming
from rankfold.cost import count_layer_macs, count_parameters
from rankfold.merging import planned_form
from rankfold.methods import (
    WEIGHT_METRIC,
    Family,
    Method,
    Moments,
    Rank,
    Spectrum,
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
    reader: str | None = None  # the linear layer that will take in a readout of its outputs
    tied: tuple[str, ...] = ()  # the layers that share its weight, and are factorized with it


def grid_of(family: Family) -> tuple[tuple[int, ...], ...]:
    """For each entry of the family's ranks, the values it takes, ascending."""
    return tuple(tuple(sorted(set(entry))) for entry in zip(*family.ranks(), strict=True))


def below_break_even(
    layer: nn.Module,
    method: Method,
    ranks: Sequence[Rank],
    input_shapes: Sequence[Sequence[int]],
    dense: Counts,
    reader: str | None = None,
) -> dict[Rank, Counts]:
    """The ranks of one method that pay, and what they cost (without what a reader takes in).

    That is no more parameters and no more MACs than the dense layer, and fewer of one. A lookup
    multiplies nothing, so of an embedding alone the parameters count.
    """
    free = dense[1] == 0

    def count(rank: Rank) -> Counts:
        skeleton = planned_form(method, layer, rank, reader)
        return count_parameters(skeleton), count_layer_macs(skeleton, input_shapes)

    return {
        rank: cost
        for rank, cost in zip(ranks, costs_of_ranks(count, ranks), strict=True)
        if cost != dense
        and cost[0] <= dense[0]
        and (cost[1] <= dense[1] or (free and cost[0] < dense[0]))
    }


def costs_of_ranks(count: Callable[[Rank], Counts], ranks: Sequence[Rank]) -> list[Counts]:
    """The cost of every rank, counting few of them.

    A chain of factors costs a sum of products of its ranks, each at most once per product, so the
    cost is multilinear: counted at the corners of the grid it is known in between. Of a single rank
    it may be quadratic (fewer units of a recurrent layer are fewer on both sides of a matrix):
    counted at three. A count or two more check that it is so; if not, it may be so of parts of the
    grid (no factor is wider than its layer), which is halved along each rank.
    """
    found = _costs(cache(count), ranks)
    return [found[rank] for rank in ranks]


def _costs(count: Callable[[Rank], Counts], ranks: Sequence[Rank]) -> dict[Rank, Counts]:
    """By interpolation on these ranks, or on each part of them."""
    nodes = [[min(entry), max(entry)] for entry in zip(*ranks, strict=True)]
    centre = [sum(entry) / 2 for entry in nodes]
    middle = min(ranks, key=partial(math.dist, centre))
    if len(nodes) == 1:
        nodes[0].append(middle[0])
    nodes = [sorted(set(entry)) for entry in nodes]
    known = {node: count(node) for node in product(*nodes)}

    def interpolate(rank: Rank) -> Counts:
        parameters = macs = 0.0
        for node, (node_parameters, node_macs) in known.items():
            weight = 1.0
            for entry, at, others in zip(rank, node, nodes, strict=True):
                for other in others:
                    weight *= 1 if other == at else (entry - other) / (at - other)
            parameters += weight * node_parameters
            macs += weight * node_macs
        return round(parameters), round(macs)

    probes = {middle, ranks[len(ranks) // 3]} - known.keys()
    if not probes:
        return {rank: count(rank) for rank in ranks}
    if all(count(probe) == interpolate(probe) for probe in probes):
        return {rank: interpolate(rank) for rank in ranks}
    parts = defaultdict(list)
    for rank in ranks:
        parts[tuple(map(gt, rank, centre))].append(rank)
    return {rank: cost for part in parts.values() for rank, cost in _costs(count, part).items()}
