"""Alternating least squares (Carroll and Chang 1970, Harshman 1970; Kolda and Bader 2009)."""

import math

import torch

from rankfold.decompose.cp.target import Target, gramian, product_of_others
from rankfold.decompose.triangular import solve_normal


def alternate(
    target: Target, factors: list[torch.Tensor], iterations: int, improvement: float
) -> list[torch.Tensor]:
    """Solve for one factor after the other until the relative error hardly falls.

    Stops after `iterations` sweeps, or when one lowers the relative error by less than
    `improvement`. The error never grows, but for rounding.
    """
    factors = [unit_columns(factor) for factor in factors]
    grams = [gramian(factor) for factor in factors]
    total = target.squared_norm
    error = math.inf
    solved = factors[-1]

    def update(mode: int, product: torch.Tensor) -> None:
        nonlocal solved, error
        normal = product_of_others(grams, mode)
        solved = solve_normal(normal, product)
        if mode == target.order - 1:
            inner = (product * solved).sum().item()
            square = (normal * gramian(solved)).sum().item()
            error = math.sqrt(max(total - 2 * inner + square, 0.0) / total)
        factors[mode] = unit_columns(solved)
        grams[mode] = gramian(factors[mode])

    for _ in range(iterations):
        before = error
        target.sweep(factors, update)
        if before - error < improvement:
            break
    return [*factors[:-1], solved] if iterations else factors


def unit_columns(factor: torch.Tensor) -> torch.Tensor:
    norms = torch.linalg.vector_norm(factor, dim=0)
    return factor / torch.where(norms > 0, norms, 1)
