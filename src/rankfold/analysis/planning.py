"""Choosing a candidate for every layer: within a budget for the whole network, or by a rule."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

import numpy as np

from rankfold.analysis.candidates import AnalysedLayer, Candidate
from rankfold.errors import BudgetError
from rankfold.knapsack import choose
from rankfold.methods import Family, Rank, Spectrum
from rankfold.plan import Cost, LayerPlan

Rule = Callable[[Spectrum], int]
Choice = Candidate | None  # None: leave the layer dense

COSTS: dict[str, Callable[[Candidate | AnalysedLayer], int]] = {
    "params": lambda of: of.parameters,
    "macs": lambda of: of.macs,
}


def choose_within_budget(
    layers: Sequence[AnalysedLayer],
    limits: Mapping[str, float],
    totals: Mapping[str, int],
) -> list[Choice]:
    """The choice per layer with the least summed loss whose network costs keep the limits.

    `limits` and `totals` (of the dense network) are absolute, in the unit of the candidates.
    Raises BudgetError, with the smallest reachable fraction of each cost, where there is none.
    """
    names = list(limits)
    options: list[list[Choice]] = [[None, *layer.candidates] for layer in layers]
    losses = [np.array([o.loss if o else 0.0 for o in group]) for group in options]
    costs = [
        np.array([[COSTS[name](o or layer) for name in names] for o in group], dtype=np.float64)
        for layer, group in zip(layers, options, strict=True)
    ]
    dense = sum((cost[0] for cost in costs), np.zeros(len(names)))
    fixed = np.array([totals[name] for name in names]) - dense
    least = fixed + sum((cost.min(axis=0) for cost in costs), np.zeros(len(names)))
    room = np.array([limits[name] for name in names]) - fixed
    # Rounded up, so that what is offered as the smallest can be asked for.
    smallest = {
        name: float(np.ceil(1e4 * (1 + 2e-6) * reachable / totals[name]) / 1e4)
        for name, reachable in zip(names, least, strict=True)
    }
    offer = ", ".join(f"{name}={fraction:g}" for name, fraction in smallest.items())
    for name, reachable in zip(names, least, strict=True):
        if reachable > limits[name]:
            raise BudgetError(
                f"{name} cannot be brought to {limits[name] / totals[name]:.4g} of the dense "
                f"network: the smallest that can be reached is {smallest[name]:g}",
                smallest,
            )
    try:
        picked = choose(losses, costs, room.tolist())
    except BudgetError as error:
        raise BudgetError(
            f"the budgets cannot be kept together; each by itself can go down to {offer}", smallest
        ) from error
    return [group[index] for group, index in zip(options, picked, strict=True)]


def choose_by_rule(layers: Sequence[AnalysedLayer], rule: Rule) -> list[tuple[Choice, str | None]]:
    """For each layer the first method that applies, at the ranks that `rule` reads off its spectra.

    Ranks are rounded up to the next candidate's. With each choice comes, for a layer that stays
    dense, the reason.
    """
    choices: list[tuple[Choice, str | None]] = []
    for layer in layers:
        if layer.reason is not None:
            choices.append((None, layer.reason))
            continue
        method, family = next(iter(layer.families.items()))
        rank = rank_by_rule(family, rule)
        found = [c for c in layer.candidates if c.method == method and c.rank == rank]
        beyond = f"rank {rank} of {method} is beyond break-even"
        choices.append((found[0], None) if found else (None, beyond))
    return choices


def rank_by_rule(family: Family, rule: Rule) -> Rank:
    """The rule's rank for each spectrum of the family, rounded up to the next candidate's."""
    entries = zip(*family.ranks(), strict=True)
    return tuple(
        min(candidate for candidate in set(entry) if candidate >= min(rule(spectrum), max(entry)))
        for spectrum, entry in zip(family.spectra, entries, strict=True)
    )


def layer_plan(
    layer: AnalysedLayer, choice: Choice, reason: str | None, batch_size: int
) -> LayerPlan:
    """The entry of a plan for one layer; costs per sample."""

    def cost(of: AnalysedLayer | Candidate) -> Cost:
        return Cost(of.parameters, round(of.macs / batch_size))

    if choice is None:
        return LayerPlan(layer.name, layer.layer, cost(layer), cost(layer), reason=reason)
    return LayerPlan(
        layer.name,
        layer.layer,
        before=cost(layer),
        after=cost(choice),
        method=choice.method,
        settings=asdict(layer.methods[choice.method]),
        rank=choice.rank,
        loss=choice.loss,
    )
