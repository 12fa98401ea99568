"""The multiple-choice knapsack: one candidate per layer, least loss in all, within the budgets."""

from collections.abc import Sequence

import numpy as np
import scipy

from rankfold.errors import BudgetError, RankfoldError

# HiGHS's tolerances are absolute, 1e-6 and below: in units of a millionth of each limit and of the
# greatest loss they are far below one MAC. A choice that uses them to exceed a limit is forbidden,
# and the rest solved again.
_UNIT = 1e6
_MOST_FORBIDDEN = 100
_MOST_STATES = 20_000_000  # of the dynamic programme, before those that lead nowhere are dropped
_ROUNDING = 1e-12
_HALVINGS = 100  # of the interval that a price is sought in


def choose(
    losses: Sequence[np.ndarray], costs: Sequence[np.ndarray], limits: Sequence[float]
) -> list[int]:
    """The index of the candidate to take in each group.

    `losses[g]` is (candidates of g,), `costs[g]` (candidates of g, budgets), `limits` (budgets,).
    Minimises the sum of losses subject to the sum of costs <= limits in every budget, to the
    optimum (relative gap 1e-9): by dynamic programming where one budget decides, else by HiGHS.
    Raises BudgetError if the limits cannot be met.
    """
    if not losses:
        return []
    limit = np.asarray(limits, dtype=np.float64)
    # What is best within one limit and happens to keep the others is best within all.
    for budget in range(len(limit)):
        columns = [np.asarray(cost, dtype=np.float64)[:, budget] for cost in costs]
        found = _choose_by_states(losses, columns, float(limit[budget]))
        if found is not None and (_spent(costs, found) <= limit).all():
            return found
    return choose_by_solver(losses, costs, limits)


def choose_by_solver(
    losses: Sequence[np.ndarray], costs: Sequence[np.ndarray], limits: Sequence[float]
) -> list[int]:
    """What `choose` does, by HiGHS."""
    limit = np.asarray(limits, dtype=np.float64)
    unit = np.where(limit > 0, limit, 1.0) / _UNIT
    scaled = [np.asarray(cost, dtype=np.float64) / unit for cost in costs]
    kept = [undominated(loss, cost) for loss, cost in zip(losses, scaled, strict=True)]
    group = np.repeat(np.arange(len(kept)), [len(indices) for indices in kept])
    loss = np.concatenate([losses[g][indices] for g, indices in enumerate(kept)])
    cost = np.concatenate([scaled[g][indices] for g, indices in enumerate(kept)])
    one_each = scipy.sparse.csr_array(
        (np.ones(len(group)), (group, np.arange(len(group)))), shape=(len(kept), len(group))
    )
    constraints = [
        scipy.optimize.LinearConstraint(one_each, 1, 1),
        scipy.optimize.LinearConstraint(cost.T, -np.inf, limit / unit),
    ]
    for _ in range(_MOST_FORBIDDEN):
        solution = scipy.optimize.milp(
            loss / (loss.max() or 1.0) * _UNIT,
            constraints=constraints,
            integrality=np.ones(len(group)),
            bounds=scipy.optimize.Bounds(0, 1),
            options={"mip_rel_gap": 1e-9},
        )
        if solution.status == 2:
            break
        if solution.x is None:
            raise RankfoldError(f"the solver stopped without a plan: {solution.message}")
        picked = [int(solution.x[group == g].argmax()) for g in range(len(kept))]
        chosen = [int(indices[pick]) for indices, pick in zip(kept, picked, strict=True)]
        if (_spent(costs, chosen) <= limit).all():
            return chosen
        forbidden = np.zeros(len(group))
        for g, pick in enumerate(picked):
            forbidden[np.flatnonzero(group == g)[pick]] = 1
        constraints.append(scipy.optimize.LinearConstraint(forbidden, -np.inf, len(kept) - 1))
    raise BudgetError("no choice of candidates meets the budget")


def _spent(costs: Sequence[np.ndarray], chosen: Sequence[int]) -> np.ndarray:
    """The cost of a choice in every budget."""
    return np.sum([np.asarray(c, dtype=float)[i] for c, i in zip(costs, chosen, strict=True)], 0)


def _choose_by_states(
    losses: Sequence[np.ndarray], costs: Sequence[np.ndarray], limit: float
) -> list[int] | None:
    """The choice within one limit, or None if there are too many states to keep.

    Dynamic programming over lists of undominated (cost, loss), group by group, less those that
    cannot become better than a choice that is known: by the Lagrangian bound of the groups still
    to come (Pisinger 1995 has the like). Layers of one shape come to few distinct costs, among
    which branch and bound would search long.
    """
    kept = [undominated(loss, cost[:, None]) for loss, cost in zip(losses, costs, strict=True)]
    losses = [np.asarray(losses[g], dtype=np.float64)[k] for g, k in enumerate(kept)]
    costs = [costs[g][k] for g, k in enumerate(kept)]
    # Rounding must not rule out what meets a limit exactly.
    room = limit + _ROUNDING * abs(limit)
    least_costs = _still_to_come([cost.min() for cost in costs])
    if least_costs[0] > room:
        raise BudgetError("no choice of candidates meets the budget")
    price = _price(losses, costs, limit)
    incumbent = _greedy(losses, costs, limit, price)
    bounds = _still_to_come(
        [(loss + price * cost).min() for loss, cost in zip(losses, costs, strict=True)]
    )
    spent, lost = np.zeros(1), np.zeros(1)
    history: list[tuple[np.ndarray, np.ndarray]] = []  # per group: state before, candidate
    for g, (loss, cost) in enumerate(zip(losses, costs, strict=True)):
        if len(spent) * len(cost) > _MOST_STATES:
            return None
        new_spent = (spent[:, None] + cost).ravel()
        new_lost = (lost[:, None] + loss).ravel()
        bound = new_lost + bounds[g + 1] - price * (limit - new_spent)
        able = np.flatnonzero(
            (new_spent + least_costs[g + 1] <= room)
            & (bound <= incumbent + _ROUNDING * (abs(incumbent) + price * abs(limit)))
        )
        order = able[np.lexsort((new_lost[able], new_spent[able]))]
        falling = np.minimum.accumulate(new_lost[order])
        order = order[np.diff(falling, prepend=np.inf) < 0]
        spent, lost = new_spent[order], new_lost[order]
        history.append(np.divmod(order, len(cost)))
    within = np.flatnonzero(spent <= limit)
    if len(within) == 0:
        raise BudgetError("no choice of candidates meets the budget")
    state = within[lost[within].argmin()]
    chosen = []
    for before, picked in reversed(history):
        chosen.append(int(picked[state]))
        state = before[state]
    return [int(k[pick]) for k, pick in zip(kept, reversed(chosen), strict=True)]


def _still_to_come(values: Sequence[float]) -> np.ndarray:
    """Sums of the values from each place on, and 0: one more than there are values."""
    return np.append(np.cumsum(values[::-1])[::-1], 0.0)


def _price(losses: Sequence[np.ndarray], costs: Sequence[np.ndarray], limit: float) -> float:
    """The Lagrangian multiplier of the limit: the loss that a unit of cost is worth.

    The least at which what is best in every group by itself keeps the limit.
    """

    def spends(price: float) -> float:
        best = ((loss + price * cost).argmin() for loss, cost in zip(losses, costs, strict=True))
        return sum(cost[pick] for cost, pick in zip(costs, best, strict=True))

    if spends(0.0) <= limit:
        return 0.0
    slopes = [
        (loss.max() - loss.min()) / steps.min()
        for loss, cost in zip(losses, costs, strict=True)
        if len(steps := np.diff(np.unique(cost)))
    ]
    low, high = 0.0, 2 * max(slopes, default=0.0)
    least = high * 1e-18
    for _ in range(_HALVINGS):
        # Prices of networks are many orders of magnitude apart.
        middle = (max(low, least) * high) ** 0.5
        if spends(middle) <= limit:
            high = middle
        else:
            low = middle
    return high


def _greedy(
    losses: Sequence[np.ndarray], costs: Sequence[np.ndarray], limit: float, price: float
) -> float:
    """The loss of a choice that keeps the limit, infinite if none is found.

    The best of each group at the price, then one change after another that lowers the loss most.
    """
    picked = [int((x + price * c).argmin()) for x, c in zip(losses, costs, strict=True)]
    spent = sum(cost[pick] for cost, pick in zip(costs, picked, strict=True))
    if spent > limit:
        return np.inf
    while True:
        gains = [
            np.where(spent - cost[pick] + cost <= limit, loss[pick] - loss, -np.inf)
            for loss, cost, pick in zip(losses, costs, picked, strict=True)
        ]
        g = int(np.argmax([gain.max() for gain in gains]))
        if gains[g].max() <= 0:
            return float(sum(loss[pick] for loss, pick in zip(losses, picked, strict=True)))
        picked[g] = int(gains[g].argmax())
        spent = sum(cost[pick] for cost, pick in zip(costs, picked, strict=True))


def choose_least_greatest(
    losses: Sequence[np.ndarray], costs: Sequence[np.ndarray], limits: Sequence[float]
) -> list[int]:
    """As `choose`, but of the greatest loss of any group the least (Liebenwein et al. 2021, ALDS).

    Of those within that loss the choice that is cheapest, relative to the limits; the loss is found
    by bisection.
    """
    limit = np.asarray(limits, dtype=np.float64)
    prices = [(cost / np.where(limit > 0, limit, 1.0)).sum(1) for cost in costs]

    def within(most: float) -> list[int] | None:
        allowed = [np.flatnonzero(loss <= most) for loss in losses]
        if any(len(indices) == 0 for indices in allowed):
            return None
        fewer = [price[indices] for price, indices in zip(prices, allowed, strict=True)]
        picked = [int(price.argmin()) for price in fewer]
        if len(limit) > 1:  # the cheapest in all may be too dear in one budget
            kept = [cost[indices] for cost, indices in zip(costs, allowed, strict=True)]
            try:
                picked = choose(fewer, kept, limits)
            except BudgetError:
                return None
        found = [int(i[pick]) for i, pick in zip(allowed, picked, strict=True)]
        spent = sum((cost[i] for cost, i in zip(costs, found, strict=True)), 0 * limit)
        return found if (spent <= limit).all() else None

    levels = np.unique(np.concatenate(losses)) if losses else np.zeros(1)
    low, high = 0, len(levels) - 1
    best = within(levels[high])
    if best is None:
        raise BudgetError("no choice of candidates meets the budget")
    while low < high:
        middle = (low + high) // 2
        found = within(levels[middle])
        if found is None:
            low = middle + 1
        else:
            best, high = found, middle
    return best


def undominated(loss: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Indices of the candidates that none other beats or equals in loss and every cost.

    `loss` is (n,), `cost` (n, budgets). Of equal candidates the first is kept.
    """
    order = np.lexsort((loss, *cost.T[::-1]))  # by first cost, then the next, ties by loss
    kept: list[int] = []
    if cost.shape[1] == 1:
        least = np.inf
        for index in order:
            if loss[index] < least:
                kept.append(index)
                least = loss[index]
        return np.array(kept)
    points = np.column_stack([loss, cost])
    for index in order:
        if not (points[kept] <= points[index]).all(axis=1).any():
            kept.append(index)
    return np.array(kept)
