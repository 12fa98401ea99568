import math
from dataclasses import replace
from itertools import product

import pytest
from networks import make_data, make_model

import rankfold
from rankfold.analysis import AnalysedLayer, Candidate
from rankfold.analysis.planning import Limit, choose_within_budget
from rankfold.errors import BudgetError
from rankfold.methods import Moments

COSTS = {"a": [90, 60, 30], "b": [80, 50, 20], "c": [70, 40]}
LOSSES = {"a": [0.02, 0.3, 0.6], "b": [0.1, 0.2, 0.9], "c": [0.05, 0.5]}


def layers(scale: float | None = None) -> list[AnalysedLayer]:
    return [
        AnalysedLayer(
            name,
            "Linear",
            100,
            100,
            None,
            {},
            {},
            tuple(
                Candidate("svd", (rank,), loss, cost, cost)
                for rank, (loss, cost) in enumerate(zip(LOSSES[name], costs, strict=True))
            ),
            {},
            Moments(scale=scale),
        )
        for name, costs in COSTS.items()
    ]


@pytest.mark.parametrize("budget", [0.9, 0.7, 0.5, 0.35])
@pytest.mark.parametrize("objective", ["sum", "max", "product"])
def test_no_other_choice_within_the_budget_is_better(objective, budget) -> None:
    """By trying all of them."""

    def value(losses: list[float]) -> float:
        return {
            "sum": sum(losses),
            "max": max(losses),
            "product": -math.prod(1 - loss for loss in losses),
        }[objective]

    picked = choose_within_budget(layers(), {"macs": Limit(300 * budget, 300)}, objective)
    options = [
        [(0.0, 100), *zip(LOSSES[name], COSTS[name], strict=True)] for name in ("a", "b", "c")
    ]
    best = min(
        value([loss for loss, _ in chosen])
        for chosen in product(*options)
        if sum(cost for _, cost in chosen) <= 300 * budget
    )
    assert sum(100 if c is None else c.macs for c in picked) <= 300 * budget
    assert value([0.0 if c is None else c.loss for c in picked]) == pytest.approx(best, abs=1e-9)


def test_a_product_of_energies_needs_relative_losses() -> None:
    with pytest.raises(BudgetError, match="svd-llm"):
        choose_within_budget(layers(scale=0.5), {"macs": Limit(200, 300)}, "product")


def test_the_product_is_an_objective_of_plans() -> None:
    analysis = rankfold.analyze(make_model(), make_data(), metric="svd-llm", check=False)
    found = analysis.plan(macs=0.4, objective="product")
    other = analysis.plan(macs=0.4)

    def kept(plan: rankfold.Plan) -> float:
        return math.prod(1 - entry.loss for entry in plan.factorized)

    assert found.request["objective"] == "product"
    assert kept(found) >= kept(other) - 1e-9


def test_the_smallest_of_what_cannot_shrink_is_all_of_it() -> None:
    """A fraction that can be asked for: above 1 it would be a number of parameters."""
    stuck = [replace(layer, candidates=()) for layer in layers()]
    limit = Limit(150, 300)
    with pytest.raises(BudgetError) as refused:
        choose_within_budget(stuck, {"params": limit})
    assert refused.value.smallest == {"params": 1.0}


def test_a_network_that_costs_nothing_has_no_budget() -> None:
    analysis = rankfold.Analysis((), 0, 0, 0, 1, "weight")
    with pytest.raises(BudgetError, match="none to save"):
        analysis.plan(macs=0.5)
