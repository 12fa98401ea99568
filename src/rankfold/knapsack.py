"""The multiple-choice knapsack: one candidate per layer, least loss in all, within the budgets."""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from rankfold.errors import BudgetError, RankfoldError

# HiGHS's tolerances are absolute, 1e-6 and below: in units of a millionth of each limit and of the
# greatest loss they are far below one MAC. A choice that uses them to exceed a limit is forbidden,
# and the rest solved again.
_UNIT = 1e6
_MOST_FORBIDDEN = 100


def choose(
    losses: Sequence[np.ndarray], costs: Sequence[np.ndarray], limits: Sequence[float]
) -> list[int]:
    """The index of the candidate to take in each group.

    `losses[g]` is (candidates of g,), `costs[g]` (candidates of g, budgets), `limits` (budgets,).
    Minimises the sum of losses subject to the sum of costs <= limits in every budget, to the
    optimum (relative gap 1e-9), by HiGHS. Raises BudgetError if the limits cannot be met.
    """
    if not losses:
        return []
    limit = np.asarray(limits, dtype=np.float64)
    unit = np.where(limit > 0, limit, 1.0) / _UNIT
    scaled = [np.asarray(cost, dtype=np.float64) / unit for cost in costs]
    kept = [undominated(loss, cost) for loss, cost in zip(losses, scaled, strict=True)]
    group = np.repeat(np.arange(len(kept)), [len(indices) for indices in kept])
    loss = np.concatenate([losses[g][indices] for g, indices in enumerate(kept)])
    cost = np.concatenate([scaled[g][indices] for g, indices in enumerate(kept)])
    one_each = csr_array(
        (np.ones(len(group)), (group, np.arange(len(group)))), shape=(len(kept), len(group))
    )
    constraints = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(cost.T, -np.inf, limit / unit),
    ]
    for _ in range(_MOST_FORBIDDEN):
        solution = milp(
            loss / (loss.max() or 1.0) * _UNIT,
            constraints=constraints,
            integrality=np.ones(len(group)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 1e-9},
        )
        if solution.status == 2:
            break
        if solution.x is None:
            raise RankfoldError(f"the solver stopped without a plan: {solution.message}")
        picked = [int(solution.x[group == g].argmax()) for g in range(len(kept))]
        chosen = [int(indices[pick]) for indices, pick in zip(kept, picked, strict=True)]
        spent = sum(
            (np.asarray(costs[g][index], dtype=np.float64) for g, index in enumerate(chosen)),
            np.zeros(len(limit)),
        )
        if (spent <= limit).all():
            return chosen
        forbidden = np.zeros(len(group))
        for g, pick in enumerate(picked):
            forbidden[np.flatnonzero(group == g)[pick]] = 1
        constraints.append(LinearConstraint(forbidden, -np.inf, len(kept) - 1))
    raise BudgetError("no choice of candidates meets the budget")


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
