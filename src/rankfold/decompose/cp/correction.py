"""Error-preserving correction of a CP decomposition.

Phan, Tichavsky, Cichocki: Error preserving correction: a method for CP decomposition at a target
error bound. IEEE Transactions on Signal Processing 67 (2019). For kernels: Phan et al.: Stable
low-rank tensor decomposition for compression of convolutional neural network. ECCV 2020.
"""

from dataclasses import dataclass

import torch

from rankfold.decompose.cp.als import unit_columns
from rankfold.decompose.cp.target import Target, gramian, product_of_others

# Of the trace of the normal equations: the dampings between which one is sought, and where first.
_LEAST, _FIRST, _GREATEST = 1e-15, 1e-6, 1e16
_NEAR = 1e-3  # relative: dampings so near are the same


def preserve_error(
    target: Target,
    factors: list[torch.Tensor],
    bound: float,
    iterations: int = 200,
    improvement: float = 1e-3,
) -> list[torch.Tensor]:
    """Lower the sum of the squared norms of the terms, the error staying within `bound`.

    `bound` is the squared error allowed. One factor after the other: with unit columns elsewhere
    the sum is the squared norm of the factor, so the best one is that of a ridge regression whose
    damping lets the error just reach the bound. Stops after `iterations` sweeps, or when one lowers
    the sum by less than the share `improvement`. Factors that exceed the bound come back as they
    are.
    """
    factors = list(factors)
    total = target.squared_norm
    current = [unit_columns(factor) for factor in factors]
    scale = torch.stack([torch.linalg.vector_norm(factor, dim=0) for factor in factors]).prod(0)
    sensitivity = scale.square().sum().item()
    if target.residual(factors).squared_norm > bound:
        return factors
    if bound >= total:
        return [torch.zeros_like(factor) for factor in factors]
    solved = current[-1] * scale
    grams = [gramian(factor) for factor in current]

    dampings: dict[int, float] = {}

    def update(mode: int, product: torch.Tensor) -> None:
        nonlocal solved
        normal = product_of_others(grams, mode)
        found = _ridge_within(normal, product, total, bound, dampings.get(mode))
        if found is None:
            solved = current[mode] * torch.linalg.vector_norm(solved, dim=0)
            return
        solved, dampings[mode] = found
        current[mode] = unit_columns(solved)
        grams[mode] = gramian(current[mode])

    for _ in range(iterations):
        target.sweep(current, update)
        before, sensitivity = sensitivity, solved.square().sum().item()
        if before - sensitivity < improvement * before:
            break
    return [*current[:-1], solved] if iterations else factors


def _ridge_within(
    normal: torch.Tensor,
    product: torch.Tensor,
    total: float,
    bound: float,
    damping: float | None = None,
) -> tuple[torch.Tensor, float] | None:
    """The factor of least norm whose squared error is at most `bound`, and its damping.

    The squared error is a concave function of the square of the damping, so that Newton's method
    comes up to the bound from below, from any `damping` given. None where rounding alone stands
    between the least error and the bound.
    """
    trace = normal.diagonal().sum().item()
    low, high = _LEAST * trace, _GREATEST * trace
    damping = _FIRST * trace if damping is None else damping
    best = None
    while high > (1 + _NEAR) * low:
        damping = min(max(damping, low), high)
        solved = _ridge(normal, product, damping)
        following = 0.0
        if solved is None:
            low = damping
        else:
            excess = total - solved.explained - bound
            if excess > 0:
                high = damping
            else:
                low, best = damping, (solved.factor, damping)
            if solved.slope > 0:
                following = max(damping**2 - excess / solved.slope, 0.0) ** 0.5
            if excess <= 0 and following < (1 + _NEAR) * damping:
                break
        damping = following if low < following < high else (low * high) ** 0.5
    return best


@dataclass(frozen=True)
class _Ridge:
    factor: torch.Tensor
    explained: float  # of the squared norm: it less the squared error
    slope: float  # of the squared error, by the square of the damping


def _ridge(normal: torch.Tensor, product: torch.Tensor, damping: float) -> _Ridge | None:
    """None where the damped normal equations are singular to rounding."""
    damped = normal.clone()
    damped.diagonal().add_(damping)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        return None
    half = torch.linalg.solve_triangular(lower, product.mT, upper=False)
    factor = torch.linalg.solve_triangular(lower.mT, half, upper=True)
    again = torch.linalg.solve_triangular(lower, factor, upper=False)
    explained = half.square().sum() + damping * factor.square().sum()
    return _Ridge(factor.mT, explained.item(), again.square().sum().item())
