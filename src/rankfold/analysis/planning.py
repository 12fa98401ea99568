"""Choosing a candidate for every layer: within a budget for the whole network, or by a rule."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from rankfold.analysis.candidates import AnalysedLayer, Candidate
from rankfold.errors import BudgetError
from rankfold.knapsack import choose, choose_least_greatest
from rankfold.methods import Rank, Spectrum
from rankfold.plan import Cost, LayerPlan

Rule = Callable[[Spectrum], int]
Objective = Literal["sum", "max", "product"]
_ALL = 1 - 1e-12  # a layer without any of its energy
Choice = Candidate | None  # None: leave the layer dense


def _latencies(layer: AnalysedLayer) -> np.ndarray:
    if layer.timing is None:  # its time is part of what stays
        return np.zeros(1 + len(layer.candidates))
    found = np.empty(1 + len(layer.candidates))
    found[0] = layer.timing.dense_ms
    for method in layer.timing.tables:
        places = [i for i, c in enumerate(layer.candidates, 1) if c.method == method]
        if places:
            ranks = [layer.candidates[place - 1].rank for place in places]
            found[places] = layer.timing.of(method, ranks)
    return found


def _counts(layer: AnalysedLayer, count: Callable[[AnalysedLayer | Candidate], int]) -> np.ndarray:
    counts = [count(layer), *(count(candidate) for candidate in layer.candidates)]
    return np.array(counts, dtype=np.float64)


def milliseconds_of(layer: AnalysedLayer, choice: Choice) -> float | None:
    """Of all calls of a layer as it is or as a candidate; None if it was not timed."""
    if layer.timing is None:
        return None
    if choice is None:
        return layer.timing.dense_ms
    return float(layer.timing.of(choice.method, [choice.rank])[0])


# What a layer costs dense and as each of its candidates: (1 + candidates,).
COSTS: dict[str, Callable[[AnalysedLayer], np.ndarray]] = {
    "params": lambda layer: _counts(layer, lambda of: of.parameters),
    "macs": lambda layer: _counts(layer, lambda of: of.macs),
    "memory": lambda layer: layer.element_size * _counts(layer, lambda of: of.parameters),
    "latency": _latencies,
}


@dataclass(frozen=True)
class Limit:
    """A budget of one cost, absolute, in the unit of `COSTS`."""

    most: float  # of the whole network
    dense: float  # what the dense network costs
    fixed: float | None = None  # what remains whatever is planned; None: by subtraction


def choose_within_budget(
    layers: Sequence[AnalysedLayer],
    limits: Mapping[str, Limit],
    objective: Objective = "sum",
    forced: Collection[str] = (),
) -> list[Choice]:
    """The choice per layer that keeps the limits, with the least of the objective.

    That is the sum of the losses; the greatest of them; or, of losses relative to the whole layer,
    such that the product of the shares of energy that are kept is greatest. With a limit of
    latency, only candidates that are faster than the dense layer count. The layers `forced` by name
    do not stay dense. Raises BudgetError, with the smallest reachable fraction of each cost, where
    there is none.
    """
    names = list(limits)
    options: list[list[Choice]] = []
    losses, costs = [], []
    if objective == "product":
        _check_relative(layers)
    for layer in layers:
        cost = np.column_stack([COSTS[name](layer) for name in names])
        kept = list(range(len(cost)))
        if "latency" in limits:
            times = cost[:, names.index("latency")]
            kept = [0, *np.flatnonzero(times < times[0])]
        if layer.name in forced:
            kept = kept[1:] or list(range(1, len(cost)))
        group: list[Choice] = [None, *layer.candidates]
        options.append([group[index] for index in kept])
        lost = np.array([0.0, *(c.loss for c in layer.candidates)])[kept]
        losses.append(-np.log1p(-np.minimum(lost, _ALL)) if objective == "product" else lost)
        costs.append(cost[kept])
    fixed = np.array(
        [
            limit.dense - sum(COSTS[name](layer)[0] for layer in layers)
            if limit.fixed is None
            else limit.fixed
            for name, limit in limits.items()
        ]
    )
    least = fixed + sum((cost.min(axis=0) for cost in costs), np.zeros(len(names)))
    room = np.array([limit.most for limit in limits.values()]) - fixed
    smallest = {
        name: _offered(reachable, limit.dense)
        for (name, limit), reachable in zip(limits.items(), least, strict=True)
    }
    offer = ", ".join(f"{name}={fraction:g}" for name, fraction in smallest.items())
    for (name, limit), reachable in zip(limits.items(), least, strict=True):
        if reachable > limit.most:
            raise BudgetError(
                f"{name} cannot be brought to {limit.most / limit.dense:.4g} of the dense "
                f"network: the smallest that can be reached is {smallest[name]:g}",
                smallest,
            )
    solve = choose_least_greatest if objective == "max" else choose
    try:
        picked = solve(losses, costs, room.tolist())
    except BudgetError as error:
        raise BudgetError(
            f"the budgets cannot be kept together; each by itself can go down to {offer}", smallest
        ) from error
    return [group[index] for group, index in zip(options, picked, strict=True)]


def _offered(reachable: float, dense: float) -> float:
    """A fraction rounded up, so that it can be asked for; above 1 it would be no fraction."""
    share = float(reachable / dense) if dense else 1.0
    rounded = math.ceil(1e4 * (1 + 2e-6) * share) / 1e4
    return min(rounded, 1.0) if share <= 1 else rounded


def _check_relative(layers: Sequence[AnalysedLayer]) -> None:
    for layer in layers:
        if layer.candidates and layer.moments.scale is not None:
            raise BudgetError(
                "the product of energies is of losses relative to each layer's: analyze with "
                "metric='weight' or 'svd-llm'"
            )


def choose_by_rule(
    layers: Sequence[AnalysedLayer], rule: Rule, forced: Collection[str] = ()
) -> list[tuple[Choice, str | None]]:
    """For each layer the first method with spectra, at the ranks that `rule` reads off them.

    Ranks are rounded up to the next candidate's; of a layer `forced` by name beyond break-even, the
    candidate of least loss is taken. With each choice comes, for a layer that stays
    dense, the reason.
    """
    choices: list[tuple[Choice, str | None]] = []
    for layer in layers:
        if layer.reason is not None:
            choices.append((None, layer.reason))
            continue
        method = next((name for name in layer.methods if layer.spectra[name]), None)
        beyond, found = "its methods have no spectrum to read a rank off", []
        if method is not None:
            if not all(layer.grids[method]):
                choices.append((None, "no rank is allowed"))
                continue
            rank = rank_by_rule(layer.spectra[method], layer.grids[method], rule)
            found = [c for c in layer.candidates if c.method == method and c.rank == rank]
            beyond = f"rank {rank} of {method} is beyond break-even"
        if not found and layer.name in forced:
            found = sorted(layer.candidates, key=lambda candidate: candidate.loss)
        choices.append((found[0], None) if found else (None, beyond))
    return choices


def rank_by_rule(spectra: Sequence[Spectrum], grid: Sequence[Sequence[int]], rule: Rule) -> Rank:
    """The rule's rank for each spectrum, rounded up to the next candidate's."""
    return tuple(
        min(candidate for candidate in entry if candidate >= min(rule(spectrum), max(entry)))
        for spectrum, entry in zip(spectra, grid, strict=True)
    )


def layer_plan(
    layer: AnalysedLayer, choice: Choice, reason: str | None, batch_size: int
) -> LayerPlan:
    """The entry of a plan for one layer; costs per sample."""

    def cost(of: Choice) -> Cost:
        counts = of or layer
        macs = round(counts.macs / batch_size)
        return Cost(counts.parameters, macs, milliseconds_of(layer, of))

    if choice is None:
        return LayerPlan(layer.name, layer.layer, cost(None), cost(None), reason=reason)
    return LayerPlan(
        layer.name,
        layer.layer,
        before=cost(None),
        after=cost(choice),
        method=choice.method,
        settings=asdict(layer.methods[choice.method]),
        rank=choice.rank,
        loss=choice.loss,
        reader=layer.reader,
        tied=layer.tied,
    )
