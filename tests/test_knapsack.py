from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankfold.errors import BudgetError
from rankfold.knapsack import choose, choose_by_solver, choose_least_greatest, undominated

candidate = st.tuples(st.floats(0, 1), st.integers(1, 50), st.integers(1, 50))
groups = st.lists(st.lists(candidate, min_size=1, max_size=6), min_size=1, max_size=5)


def arrays(drawn, budgets: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    losses = [np.array([c[0] for c in group]) for group in drawn]
    costs = [np.array([c[1 : 1 + budgets] for c in group], dtype=float) for group in drawn]
    return losses, costs


@given(groups, st.integers(1, 2), st.floats(0, 1))
def test_choice_is_optimal_and_within_the_budgets(drawn, budgets, tightness) -> None:
    losses, costs = arrays(drawn, budgets)
    least, most = (sum(f(c, axis=0) for c in costs) for f in (np.min, np.max))
    limits = np.round(least + tightness * (most - least))
    best = np.inf
    for picks in product(*(range(len(group)) for group in drawn)):
        spent = sum(cost[pick] for cost, pick in zip(costs, picks, strict=True))
        if (spent <= limits).all():
            best = min(best, sum(loss[p] for loss, p in zip(losses, picks, strict=True)))
    if best == np.inf:
        with pytest.raises(BudgetError):
            choose(losses, costs, limits)
        return
    chosen = choose(losses, costs, limits)
    assert (sum(cost[pick] for cost, pick in zip(costs, chosen, strict=True)) <= limits).all()
    found = sum(loss[pick] for loss, pick in zip(losses, chosen, strict=True))
    assert found == pytest.approx(best, abs=1e-6)
    assert choose(losses, costs, limits) == chosen


@given(st.lists(candidate, min_size=1, max_size=30), st.integers(1, 2))
def test_undominated_candidates_are_the_pareto_set(drawn, budgets) -> None:
    (loss,), (cost,) = arrays([drawn], budgets)
    points = np.column_stack([loss, cost])
    expected = {
        tuple(point)
        for point in points
        if not ((points <= point).all(axis=1) & (points < point).any(axis=1)).any()
    }
    kept = undominated(loss, cost)
    assert len(kept) == len(expected)  # of equals, one
    assert {tuple(points[index]) for index in kept} == expected


def test_a_budget_of_exactly_everything_is_enough() -> None:
    losses = [np.array([0.0, 0.5]), np.array([0.0, 0.7])]
    costs = [np.array([[123456789.0], [1.0]]), np.array([[987654321.0], [1.0]])]
    assert choose(losses, costs, [123456789 + 987654321]) == [0, 0]
    assert choose(losses, costs, [123456789 + 987654320]) == [1, 0]


def test_a_budget_of_exactly_the_cheapest_is_enough() -> None:
    """One above it costs a millionth more, which the solver cannot tell apart."""
    losses, costs = [np.array([1.0, 0.0])] * 2, [np.array([[2e6], [2e6 + 1]])] * 2
    assert choose(losses, costs, [4e6]) == [0, 0]
    assert choose(losses, costs, [4e6 + 1]) in ([0, 1], [1, 0])


@pytest.mark.filterwarnings("error")
def test_a_budget_of_nothing_is_kept_by_what_costs_nothing() -> None:
    assert choose([np.array([0.0, 1.0])], [np.array([[1.0], [0.0]])], [0.0]) == [1]


@given(st.integers(0, 1000))
def test_choice_is_optimal_over_many_orders_of_magnitude(seed) -> None:
    """To the gap that is promised, with a limit that one choice spends to the last unit."""
    rng = np.random.default_rng(seed)
    losses = [rng.random(4) * 10.0 ** rng.integers(-9, 1) for _ in range(4)]
    costs = [rng.integers(1, 10 ** rng.integers(1, 10), (4, 2)).astype(float) for _ in range(4)]

    def total(values, picks):
        return sum(value[pick] for value, pick in zip(values, picks, strict=True))

    limits = total(costs, rng.integers(4, size=4))
    chosen = choose(losses, costs, limits)
    assert (total(costs, chosen) <= limits).all()
    best = min(
        total(losses, picks)
        for picks in product(range(4), repeat=4)
        if (total(costs, picks) <= limits).all()
    )
    assert total(losses, chosen) == pytest.approx(best, rel=2e-9, abs=0)


def test_nothing_to_choose() -> None:
    assert choose([], [], [5.0]) == []


def test_impossible_budget() -> None:
    with pytest.raises(BudgetError):
        choose([np.array([0.0])], [np.array([[10.0]])], [9.0])


def test_a_network_of_many_layers_is_planned_to_the_optimum_of_its_relaxation() -> None:
    """Fifty layers of four hundred candidates: the optimum lies within a whisker of the bound."""
    rng = np.random.default_rng(0)
    ranks = np.arange(1, 401)
    decays = rng.uniform(0.002, 0.05, 50)
    losses = [np.exp(-decay * ranks) for decay in decays]
    costs = [(ranks * rng.integers(100, 1000)).astype(float)[:, None] for _ in decays]
    limit = 0.3 * sum(cost[-1, 0] for cost in costs)
    chosen = choose(losses, costs, [limit])
    spent = sum(cost[pick, 0] for cost, pick in zip(costs, chosen, strict=True))
    found = sum(loss[pick] for loss, pick in zip(losses, chosen, strict=True))
    assert spent <= limit

    # Lagrange: for any price the sum of cheapest candidates bounds the optimum from below.
    def bound(price: float) -> float:
        pairs = zip(losses, costs, strict=True)
        return sum((loss + price * cost[:, 0]).min() for loss, cost in pairs) - price * limit

    best_bound = max(bound(price) for price in np.geomspace(1e-9, 1e-3, 2000))
    assert best_bound <= found <= best_bound * 1.001


def least_greatest(losses, costs, limits) -> float | None:
    """By trying all choices; None if none is within the limits."""
    found = [
        max(loss[pick] for loss, pick in zip(losses, picks, strict=True))
        for picks in product(*(range(len(loss)) for loss in losses))
        if (sum(cost[pick] for cost, pick in zip(costs, picks, strict=True)) <= limits).all()
    ]
    return min(found, default=None)


def check_least_greatest(drawn, budgets: int, tightness: float) -> None:
    losses, costs = arrays(drawn, budgets)
    least, most = (sum(f(c, axis=0) for c in costs) for f in (np.min, np.max))
    limits = np.round(least + tightness * (most - least))
    best = least_greatest(losses, costs, limits)
    if best is None:
        with pytest.raises(BudgetError):
            choose_least_greatest(losses, costs, limits.tolist())
        return
    chosen = choose_least_greatest(losses, costs, limits.tolist())
    assert (sum(cost[pick] for cost, pick in zip(costs, chosen, strict=True)) <= limits).all()
    assert max(loss[pick] for loss, pick in zip(losses, chosen, strict=True)) == best


@given(groups, st.floats(0, 1))
def test_the_greatest_loss_is_least_within_a_budget(drawn, tightness) -> None:
    """Where every layer may stay as it is, without loss."""
    check_least_greatest([[(0.0, 60, 60), *group] for group in drawn], 1, tightness)


def test_the_greatest_loss_is_least_where_layers_must_lose() -> None:
    losses, costs = [np.array([0.0]), np.array([1.0, 0.5])], [np.ones((1, 1)), np.ones((2, 1))]
    assert choose_least_greatest(losses, costs, [2.0]) == [0, 1]
    rng = np.random.default_rng(0)
    for _ in range(200):
        drawn = [[(rng.random(), rng.integers(1, 50)) for _ in range(3)] for _ in range(3)]
        check_least_greatest(drawn, 1, rng.random())


def test_the_greatest_loss_is_least_within_two_budgets() -> None:
    losses, costs = [np.array([0.0, 1.0])], [np.array([[10.0, 10.0], [11.0, 0.0]])]
    assert choose_least_greatest(losses, costs, [10.0, 10.0]) == [0]
    rng = np.random.default_rng(0)
    for _ in range(200):
        drawn = [[(0.0, 60, 60)] for _ in range(3)]
        for group in drawn:
            group += [(rng.random(), *rng.integers(1, 50, 2).tolist()) for _ in range(3)]
        check_least_greatest(drawn, 2, rng.random())


def test_of_the_same_greatest_loss_the_cheapest_are_taken() -> None:
    losses = [np.array([0.0, 0.5, 1.0]), np.array([0.0, 0.4, 0.5])]
    costs = [np.array([[9.0], [5.0], [1.0]]), np.array([[9.0], [6.0], [4.0]])]
    assert choose_least_greatest(losses, costs, [18.0]) == [0, 0]
    assert choose_least_greatest(losses, costs, [17.0]) == [0, 1]  # 9 + 6
    assert choose_least_greatest(losses, costs, [14.0]) == [1, 2]
    assert choose_least_greatest(losses, costs, [5.0]) == [2, 2]


def test_the_greatest_loss_of_nothing_and_of_the_impossible() -> None:
    assert choose_least_greatest([], [], [5.0]) == []
    with pytest.raises(BudgetError):
        choose_least_greatest([np.array([0.0])], [np.array([[10.0]])], [9.0])


@pytest.mark.filterwarnings("error")
def test_the_greatest_loss_within_a_budget_of_nothing() -> None:
    choices = [np.array([0.0, 1.0])], [np.array([[1.0], [0.0]])]
    assert choose_least_greatest(*choices, [0.0]) == [1]


def of_one_shape(integers: bool) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Twelve layers with losses of their own, and costs that are alike or the same."""
    rng = np.random.default_rng(int(integers))
    losses, costs = [], []
    for _ in range(12):
        ranks = np.arange(1, 13) * 8.0
        cost = ranks * (768 if integers else rng.uniform(700, 800))
        losses.append(np.append(rng.random() * np.exp(-ranks / rng.uniform(20, 60)), 0.0))
        costs.append(np.append(cost, 80_000.0)[:, None])
    return losses, costs


def total(values, picks) -> float:
    return sum(value[pick] for value, pick in zip(values, picks, strict=True))


@pytest.mark.parametrize("integers", [True, False])
@pytest.mark.parametrize("share", [0.3, 0.55, 0.8])
def test_many_layers_of_one_shape_are_planned_as_by_the_solver(integers, share) -> None:
    losses, costs = of_one_shape(integers)
    limit = share * 12 * 80_000
    ours, theirs = (solve(losses, costs, [limit]) for solve in (choose, choose_by_solver))
    assert total(costs, ours) <= limit
    assert total(losses, ours) == pytest.approx(total(losses, theirs), rel=1e-8)


def test_a_budget_that_implies_the_other_decides_alone() -> None:
    losses, costs = of_one_shape(integers=True)
    limit = 0.5 * 12 * 80_000
    both = [np.column_stack([128 * cost, cost]) for cost in costs]
    alone = total(losses, choose(losses, costs, [limit]))
    for limits in ([128 * limit, 1.1 * limit], [140 * limit, limit]):
        assert total(losses, choose(losses, both, limits)) == pytest.approx(alone, rel=1e-8)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("solve", [choose, choose_by_solver, choose_least_greatest])
def test_one_budget_of_nothing_beside_another(solve) -> None:
    losses = [np.array([0.0, 0.25, 1.0]), np.array([0.0, 0.5])]
    costs = [np.array([[5.0, 1.0], [5.0, 0.0], [1.0, 0.0]]), np.array([[5.0, 0.0], [1.0, 0.0]])]
    assert solve(losses, costs, [10.0, 0.0]) == [1, 0]
    assert solve(losses, costs, [6.0, 0.0]) == [1, 1]
    with pytest.raises(BudgetError):
        solve(losses, costs, [1.0, 0.0])


def test_the_cheapest_is_so_relative_to_each_limit() -> None:
    """What counts is the share of each limit, in whatever units."""
    losses = [np.array([1.0, 1.0, 0.0])]
    costs = [np.array([[1000.0, 1.0], [2000.0, 0.1], [9e9, 1.0]])]
    assert choose_least_greatest(losses, costs, [1e6, 10.0]) == [1]
    assert choose_least_greatest(losses, [1e3 * costs[0]], [1e9, 1e4]) == [1]
    assert choose_least_greatest(losses, costs, [1e4, 1e4]) == [0]


@pytest.mark.parametrize("limits", [[1.0], [1.0, 1.0]])
def test_the_solver_says_when_nothing_meets_the_limits(limits) -> None:
    with pytest.raises(BudgetError, match="no choice of candidates"):
        choose_by_solver([np.zeros(2)], [np.full((2, len(limits)), 2.0)], limits)


def test_the_solver_chooses_among_candidates_that_lose_nothing() -> None:
    assert choose_by_solver([np.zeros(2)], [np.array([[2.0], [1.0]])], [1.0]) == [1]
