"""Alternating least squares in any metric: each factor improved in turn, the others given.

A weight is linear in each of its factors, so its squared error is quadratic in each. The normal
equations of a factor are too large to be written down in the metric of whole patches; conjugate
gradients only multiply by them, and each of their steps lowers the error.
"""

from collections.abc import Callable
from typing import TypeVar

import torch

from rankfold.methods.moments import Moments

_SWEEPS = 2
_STEPS = 3
_EXACT = 1e-20  # share of the weight's square that is rounding
_NEGLIGIBLE = 1e-20  # share of the first residual's square
_RIDGE = 1e-8  # of the mean eigenvalue


Factors = tuple[torch.Tensor, ...]
State = TypeVar("State")


def alternate(
    factors: Factors,
    sweep: Callable[..., Factors],
    product: Callable[..., torch.Tensor],
    weight: torch.Tensor,
    moments: Moments,
    sweeps: int = _SWEEPS,
) -> Factors:
    """The factors after a few sweeps, for as long as these lower the error of their product."""

    def squared_error(factors: Factors) -> float:
        return moments.squared_error(product(*factors) - weight)

    whole = moments.squared_error(weight)
    return lowered(factors, lambda given: sweep(*given), squared_error, whole, sweeps)


def lowered(
    state: State,
    sweep: Callable[[State], State],
    squared_error: Callable[[State], float],
    whole: float,
    sweeps: int = _SWEEPS,
) -> State:
    """The state after a few sweeps, for as long as these lower its error; `whole`: of nothing.

    Where moments are singular rounding may keep a sweep from doing what it should.
    """
    least = squared_error(state)
    for _ in range(sweeps):
        if least <= _EXACT * whole:
            break
        candidate = sweep(state)
        reached = squared_error(candidate)
        if not reached < least:
            break
        state, least = candidate, reached
    return state


def improve(
    factor: torch.Tensor,
    product: Callable[[torch.Tensor], torch.Tensor],
    weight: torch.Tensor,
    moments: Moments,
    precondition: Callable[[torch.Tensor], torch.Tensor],
    steps: int = _STEPS,
) -> torch.Tensor:
    """The factor, float64, after a few steps of preconditioned conjugate gradients.

    `product` is linear: the weight (out, in, *kernel) that a factor gives with the others.
    `precondition` applies a symmetric positive definite guess of the inverse of its normal
    equations. The error in the metric never rises.
    """
    weight, start = weight.double(), factor.detach().requires_grad_()
    with torch.enable_grad():
        effect = product(start)  # linear: its gradient is the transpose of the map, everywhere

    def transposed(response: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(effect, start, response, retain_graph=True)[0]

    def normal(direction: torch.Tensor) -> torch.Tensor:
        return transposed(in_metric(product(direction), moments))

    residual = transposed(in_metric(weight - effect.detach(), moments))
    return descend(factor, residual, normal, precondition, steps)


def descend(
    factor: torch.Tensor,
    residual: torch.Tensor,
    normal: Callable[[torch.Tensor], torch.Tensor],
    precondition: Callable[[torch.Tensor], torch.Tensor],
    steps: int = _STEPS,
) -> torch.Tensor:
    """The factor after steps of preconditioned conjugate gradients for its normal equations.

    `residual` is what is left of their right side, and `normal` multiplies by their matrix.
    """
    direction = torch.zeros_like(factor)
    before, first = 1.0, 0.0
    for _ in range(steps):
        preconditioned = precondition(residual)
        energy = (residual * preconditioned).sum().item()
        first = first or energy
        if energy <= _NEGLIGIBLE * first:
            break
        direction = preconditioned + (energy / before) * direction
        response = normal(direction)
        curvature = (direction * response).sum().item()
        if curvature <= 0:
            break
        length = energy / curvature
        factor = factor + length * direction
        residual = residual - length * response
        before = energy
    return factor


def damped_cholesky(gram: torch.Tensor) -> torch.Tensor:
    """The lower factors of (..., n, n), real or complex, with a little added to the diagonal.

    To precondition with: as little as makes them positive definite, 1 for a matrix of zeros.
    """
    mean = gram.diagonal(dim1=-2, dim2=-1).real.mean(-1)
    ridge = torch.where(mean > 0, _RIDGE * mean, 1)[..., None, None]
    identity = torch.eye(gram.shape[-1]).to(gram)
    lower, failed = torch.linalg.cholesky_ex(gram + ridge * identity)
    while failed.any():
        ridge = 10 * ridge
        lower, failed = torch.linalg.cholesky_ex(gram + ridge * identity)
    return lower


def in_metric(difference: torch.Tensor, moments: Moments) -> torch.Tensor:
    """G Δ A, in the shape of Δ."""
    flat = moments.times_gradients(moments.times_inputs(difference))
    return flat.reshape(difference.shape)
