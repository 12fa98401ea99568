"""Nonlinear least squares on all factors together.

A damped Gauss-Newton method (Levenberg and Marquardt) with preconditioned conjugate gradients
inside: Tomasi and Bro, Computational Statistics and Data Analysis 50 (2006); Sorber, Van Barel, De
Lathauwer, SIAM Journal on Optimization 23 (2013). Lebedev et al. 2015 decompose kernels with it.
Where the terms are nearly collinear alternating least squares crawls, since no factor can move
without the others; this does not.
"""

import torch

from rankfold.decompose.cp.target import Target, gramian, product_of_others

_LEAST_DAMPING = 1e-15


def gauss_newton(
    target: Target,
    factors: list[torch.Tensor],
    iterations: int,
    improvement: float,
    inner_iterations: int = 20,
) -> list[torch.Tensor]:
    """Move all factors at once until the relative error hardly falls.

    Stops after `iterations` steps tried, or when one that is taken lowers the relative error by
    less than `improvement`. The error never grows.
    """
    lengths = [factor.shape[0] for factor in factors]
    point = torch.cat(balanced(factors))
    norm = target.squared_norm**0.5
    residual = target.residual(list(point.split(lengths)))
    error = residual.squared_norm**0.5
    damping, growth = None, 2.0
    for _ in range(iterations):
        model = _Linearised(list(point.split(lengths)), residual)
        if damping is None:
            damping = 1e-3 * model.scale
        step = model.step(damping, inner_iterations)
        trial = torch.cat(balanced(list((point + step).split(lengths))))
        trial_residual = target.residual(list(trial.split(lengths)))
        trial_error = trial_residual.squared_norm**0.5
        expected = model.reduction(step)
        ratio = (error**2 - trial_error**2) / (2 * expected) if expected > 0 else -1.0
        if ratio > 0:
            gained = error - trial_error
            point, residual, error = trial, trial_residual, trial_error
            damping = max(damping * max(1 / 3, 1 - (2 * ratio - 1) ** 3), _LEAST_DAMPING)
            growth = 2.0
            if gained < improvement * norm and ratio > 0.1:
                break
        else:
            damping, growth = damping * growth, 2 * growth
            if damping > 1e12 * model.scale:
                break
    return list(point.split(lengths))


def balanced(factors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same terms, the columns of all modes equally long: the best scaling of the problem."""
    norms = torch.stack([torch.linalg.vector_norm(factor, dim=0) for factor in factors])
    mean = norms.log().mean(0).exp()  # 0 for a term that has vanished
    scales = torch.where(norms > 0, mean / norms, 0)
    return [factor * scale for factor, scale in zip(factors, scales, strict=True)]


class _Linearised:
    """The problem near a point: the gradient, and the products with JᵀJ.

    A point and a step are all factors one below the other, (sum of the lengths, rank).
    """

    def __init__(self, factors: list[torch.Tensor], residual: Target) -> None:
        self.factors = factors
        self.lengths = [factor.shape[0] for factor in factors]
        self.gradient = torch.cat(residual.mttkrp(factors))
        grams = [gramian(factor) for factor in factors]
        modes = range(len(factors))
        self.diagonal = torch.stack([product_of_others(grams, n) for n in modes])
        self.cross = {(n, m): product_of_others(grams, n, m) for n in modes for m in modes if n < m}
        self.scale = self.diagonal.diagonal(dim1=1, dim2=2).mean().item()

    def product(self, step: torch.Tensor) -> torch.Tensor:
        """JᵀJ times a step, from products with (rank, rank) matrices: J is never formed."""
        parts = step.split(self.lengths)
        turned = [part.mT @ factor for part, factor in zip(parts, self.factors, strict=True)]
        rows = []
        for n, (part, factor) in enumerate(zip(parts, self.factors, strict=True)):
            mixed = sum(
                self.cross[min(n, m), max(n, m)] * turned[m] for m in range(len(parts)) if m != n
            )
            rows.append(part @ self.diagonal[n] + factor @ mixed)
        return torch.cat(rows)

    def reduction(self, step: torch.Tensor) -> float:
        """By how much the linearised problem says that a step lowers half the squared error."""
        return -((self.gradient + self.product(step) / 2) * step).sum().item()

    def step(self, damping: float, iterations: int) -> torch.Tensor:
        """Conjugate gradients for (JᵀJ + damping) step = -gradient, by blocks preconditioned."""
        identity = torch.eye(self.diagonal.shape[-1]).to(self.diagonal)
        lower = torch.linalg.cholesky_ex(self.diagonal + damping * identity)[0]

        def precondition(vector: torch.Tensor) -> torch.Tensor:
            parts = zip(vector.split(self.lengths), lower, strict=True)
            return torch.cat([torch.cholesky_solve(part.mT, block).mT for part, block in parts])

        step = torch.zeros_like(self.gradient)
        rest = -self.gradient
        conditioned = precondition(rest)
        direction = conditioned
        size = (rest * conditioned).sum()
        enough = 1e-6 * size
        for _ in range(iterations):
            image = self.product(direction) + damping * direction
            along = size / (direction * image).sum()
            step = step + along * direction
            rest = rest - along * image
            conditioned = precondition(rest)
            size, previous = (rest * conditioned).sum(), size
            if not size > enough:
                break
            direction = conditioned + (size / previous) * direction
        return step
