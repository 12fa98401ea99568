"""Error-preserving correction of a CP decomposition.

Phan, Tichavsky, Cichocki: Error preserving correction: a method for CP decomposition at a target
error bound. IEEE Transactions on Signal Processing 67 (2019). For kernels: Phan et al.: Stable
low-rank tensor decomposition for compression of convolutional neural network. ECCV 2020.
"""

import math

import scipy
import torch

from rankfold.decompose.cp.als import unit_columns
from rankfold.decompose.cp.target import Target, gramian, product_of_others


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

    def update(mode: int, product: torch.Tensor) -> None:
        nonlocal solved
        solved = _ridge_within(product_of_others(grams, mode), product, total, bound)
        current[mode] = unit_columns(solved)
        grams[mode] = gramian(current[mode])

    for _ in range(iterations):
        target.sweep(current, update)
        before, sensitivity = sensitivity, solved.square().sum().item()
        if before - sensitivity < improvement * before:
            break
    return [*current[:-1], solved] if iterations else factors


def _ridge_within(
    normal: torch.Tensor, product: torch.Tensor, total: float, bound: float
) -> torch.Tensor:
    """The factor of least norm whose squared error is at most `bound`.

    In the eigenvectors of the normal equations each column's share of the error is a rational
    function of the damping, so that the damping is the root of one monotone function.
    """
    eigenvalues, vectors = torch.linalg.eigh(normal)
    eigenvalues = eigenvalues.clamp_min(1e-14 * eigenvalues[-1])
    turned = product @ vectors
    weight = turned.square().sum(0)

    def excess(log_damping: float) -> float:
        damping = math.exp(log_damping)
        explained = weight * (eigenvalues + 2 * damping) / (eigenvalues + damping).square()
        return total - explained.sum().item() - bound

    greatest = eigenvalues[-1].item()
    low, high = math.log(1e-16 * greatest), math.log(1e16 * greatest)
    if excess(low) >= 0:
        damping = 0.0  # rounding alone stands between the least error and the bound
    elif excess(high) <= 0:
        return torch.zeros_like(product)
    else:
        damping = math.exp(scipy.optimize.brentq(excess, low, high, xtol=1e-6))
        # On the safe side of the root.
        while excess(math.log(damping)) > 0:
            damping *= 1 - 1e-5
    return (turned / (eigenvalues + damping)) @ vectors.mT
