"""The best last factor for given ones before it, in any metric: a linear problem.

With W ≈ L Z, where Z (rank, in, *kernel) is the kernel of all factors before the last, pointwise
one, the L that is best in the metric of the inputs' moment A is W A Zᵀ (Z A Zᵀ)⁻¹; the gradients'
moment does not matter, because L is free. This is Jaderberg's "data reconstruction" and Zhang's
least squares on responses (Jaderberg et al. 2014, section 3.2), without visiting the data again.
"""

from collections.abc import Sequence

import torch

from rankfold.methods.moments import Moments

# Of the mean eigenvalue, added to all: features that the inputs never show get no weight from it.
_RIDGE = 1e-10


def best_last_factor(
    weight: torch.Tensor, features: torch.Tensor, moments: Moments
) -> torch.Tensor:
    """L, (out, rank), float64, of the least error of L Z as a weight (out, in, *kernel).

    `features` is Z, (rank, in, *kernel). Features that are redundant or that no input shows share
    the weight as in the solution of least norm.
    """
    seen = moments.times_inputs(features)  # Z A, (rank, in * places)
    gram = seen @ features.double().flatten(1).mT
    gram = (gram + gram.mT) / 2
    crossed = weight.double().flatten(1) @ seen.mT
    return solve(gram, crossed)


def solve(gram: torch.Tensor, crossed: torch.Tensor) -> torch.Tensor:
    """The x, (..., rows, rank), of x @ gram = crossed; of the least norm where there are many."""
    ridge = _RIDGE * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    lower, failed = torch.linalg.cholesky_ex(gram + ridge * identity)
    if failed.any() or (ridge == 0).any():
        return crossed @ torch.linalg.pinv(gram, hermitian=True)
    return torch.cholesky_solve(crossed.mT, lower).mT


def added_by_each(gram: torch.Tensor, crossed: torch.Tensor, moments: Moments) -> torch.Tensor:
    """What each feature adds to the best outputs of those before it: (..., rank, out).

    In coordinates in which all errors of the outputs count the same: the squared norm of the first
    r is what the best last factor for them keeps of the weight's, the squared error is the rest.
    `gram` is Z A Zᵀ, (..., rank, rank), and `crossed` W A Zᵀ, (..., out, rank).
    """
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    ridge = _RIDGE * gram.diagonal(dim1=-2, dim2=-1).abs().amax().item() or 1.0
    lower, failed = torch.linalg.cholesky_ex(gram + ridge * identity)
    while failed.any():
        ridge *= 10
        lower, failed = torch.linalg.cholesky_ex(gram + ridge * identity)
    added = torch.linalg.solve_triangular(lower, crossed.mT, upper=False)
    return added if moments.output_roots is None else added @ moments.output_roots[0]


def tail(kept: torch.Tensor) -> torch.Tensor:
    """What is lost with the leading 1, 2, ... of squared norms (n,): (n,), ending in 0."""
    return torch.cat([kept.flip(0).cumsum(0).flip(0)[1:], kept.new_zeros(1)])


def improved_last_factor(
    weight: torch.Tensor, last: torch.Tensor, features: torch.Tensor, moments: Moments
) -> torch.Tensor:
    """The last factor, (out, rank), float64, that is best in the metric of whole patches.

    `last` comes from a fit in the metric of channels, and comes back as it is where no more is
    known. Directions that the inputs never show stay as they are in it.
    """
    if moments.of_channels(weight.shape[1]) is moments:
        return last
    product = torch.tensordot(last.double(), features.double(), dims=1)
    return last + best_last_factor(weight.double() - product, features, moments)


def of_equal_norms(factors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The factors of a product scaled so that all have the same norm: none trains faster."""
    norms = torch.stack([torch.linalg.vector_norm(factor) for factor in factors])
    mean = norms.log().mean().exp()  # 0 for a product that vanishes
    return [
        factor * (mean / norm) if norm > 0 else factor
        for factor, norm in zip(factors, norms, strict=True)
    ]
