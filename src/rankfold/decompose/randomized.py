"""Singular value decomposition of large matrices of low rank, by random sketches.

Halko, Martinsson, Tropp: Finding structure with randomness. SIAM Review 53 (2011). Block Krylov:
Musco, Musco: Randomized block Krylov methods. NeurIPS 2015. Adaptive rank: Yu, Gu, Li: Efficient
randomized algorithms for the fixed-precision low-rank matrix approximation. SIMAX 39 (2018).
"""

import math
from functools import partial

import torch

from rankfold.decompose.decomposition import shape, working_precision
from rankfold.decompose.matrix import SVD, check_rank, in_metric, svd
from rankfold.decompose.weights import Weights
from rankfold.errors import RankError
from rankfold.ranks import tolerance_rank


def randomized_svd(
    matrix: torch.Tensor,
    rank: int | None = None,
    *,
    tolerance: float | None = None,
    oversampling: int = 10,
    iterations: int = 2,
    block_krylov: bool = True,
    weights: Weights | None = None,
    seed: int = 0,
) -> SVD:
    """A near-optimal approximation of a large matrix, at the cost of a few products with it.

    `matrix` is (..., rows, columns), float16 to float64 (half precision is computed in float32).
    Give either `rank` or `tolerance`, the relative Frobenius error to keep, for which the rank is
    grown until it is kept (by every member of a batch) and then cut to the least that keeps it. The
    sketch holds `oversampling` columns more than the rank and is sharpened by `iterations` products
    with matrix @ matrix.T, re-orthonormalised in between. `block_krylov` keeps the blocks of all
    iterations instead of the last alone: the same number of products and a smaller error, in
    return for memory of `iterations` further blocks. `weights` are those of `svd`. The same seed
    gives the same result. Carries no gradient. For small matrices, or ranks near full, `svd` is
    faster and exact. Raises RankError for an impossible rank, ValueError for NaN, infinity, or
    neither or both of rank and tolerance.
    """
    if matrix.dim() < 2 or matrix.numel() == 0:
        raise RankError(f"randomized_svd takes a non-empty matrix, not {shape(matrix)}")
    if (rank is None) == (tolerance is None):
        raise ValueError("give either a rank or a tolerance")
    if oversampling < 0 or iterations < 0:
        raise ValueError("oversampling and iterations must not be negative")
    work = working_precision(matrix.detach())
    generator = torch.Generator(work.device).manual_seed(seed)
    if rank is not None:
        check_rank(rank, min(work.shape[-2:]))
        find = partial(
            _of_rank,
            rank=rank,
            oversampling=oversampling,
            iterations=iterations,
            block_krylov=block_krylov,
            generator=generator,
        )
    else:
        assert tolerance is not None
        least = 10 * torch.finfo(work.dtype).eps
        if not least <= tolerance < 1:
            raise ValueError(f"tolerance must lie in [{least:.1e}, 1), not {tolerance}")
        find = partial(_within, tolerance=tolerance, iterations=iterations, generator=generator)
    return in_metric(find, work, weights)


def residual_norm_bound(
    decomposition: SVD, matrix: torch.Tensor, *, probes: int = 10, seed: int = 0
) -> float:
    """An upper bound of the spectral norm of the error, without forming the error.

    Holds with probability 1 - 10^-probes (Halko et al., equation 4.3), at the cost of `probes`
    products with the matrix; on average some ten times above the true norm.
    """
    work = working_precision(matrix.detach())
    generator = torch.Generator(work.device).manual_seed(seed)
    gaussian = _gaussian(work, probes, generator)
    scaled = decomposition.singular_values[..., None] * (decomposition.vh @ gaussian)
    errors = work @ gaussian - decomposition.u @ scaled
    longest = torch.linalg.vector_norm(errors.double(), dim=-2).max().item()
    return 10 * math.sqrt(2 / math.pi) * longest


def _gaussian(matrix: torch.Tensor, width: int, generator: torch.Generator) -> torch.Tensor:
    """`width` random vectors for the matrix to be multiplied with: (..., columns, width)."""
    size = (*matrix.shape[:-2], matrix.shape[-1], width)
    return torch.randn(size, dtype=matrix.dtype, device=matrix.device, generator=generator)


def _orthonormal(columns: torch.Tensor) -> torch.Tensor:
    return torch.linalg.qr(columns).Q


def _orthonormal_to(basis: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns that extend an orthonormal basis by the span of the block."""
    # Twice: once leaves rounding errors along the basis that the block then keeps.
    for _ in range(2):
        block = _orthonormal(block - basis @ (basis.mT @ block))
    return block


def _of_rank(
    matrix: torch.Tensor,
    rank: int,
    oversampling: int,
    iterations: int,
    block_krylov: bool,
    generator: torch.Generator,
) -> SVD:
    full = min(matrix.shape[-2:])
    width = min(rank + oversampling, full)
    basis = block = _orthonormal(matrix @ _gaussian(matrix, width, generator))
    projected = block.mT @ matrix  # of the whole basis, (..., size of the basis, columns)
    for _ in range(iterations):
        # The rows of the last block span the same as those of any basis of them.
        block = matrix @ _orthonormal(projected[..., -block.shape[-1] :, :].mT)
        if not block_krylov:
            basis = block = _orthonormal(block)
            projected = block.mT @ matrix
        elif basis.shape[-1] < full:
            block = _orthonormal_to(basis, block[..., : full - basis.shape[-1]])
            basis = torch.cat([basis, block], dim=-1)
            projected = torch.cat([projected, block.mT @ matrix], dim=-2)
    return _from_projection(basis, projected).truncate(rank)


def _from_projection(basis: torch.Tensor, projected: torch.Tensor) -> SVD:
    """The SVD of basis @ projected, for orthonormal columns and projected = basis.T @ matrix."""
    small = svd(projected)
    return SVD(basis @ small.u, small.singular_values, small.vh)


def _within(
    matrix: torch.Tensor, tolerance: float, iterations: int, generator: torch.Generator
) -> SVD:
    """Grow an orthonormal basis block by block until what it leaves is within the tolerance.

    What is left is kept as a matrix: its norm, unlike the difference of two large sums, is known to
    rounding.
    """
    allowed = tolerance**2 * _energy(matrix)
    full = min(matrix.shape[-2:])
    basis = matrix[..., :0]
    left = matrix.clone()
    width = 32
    while True:
        block = left @ _gaussian(left, min(width, full - basis.shape[-1]), generator)
        for _ in range(iterations):
            block = left @ _orthonormal(left.mT @ _orthonormal(block))
        block = _orthonormal_to(basis, block)
        basis = torch.cat([basis, block], dim=-1)
        left -= block @ (block.mT @ left)
        rest = _energy(left)
        if (rest <= allowed).all() or basis.shape[-1] == full:
            break
        width *= 2
    found = _from_projection(basis, basis.mT @ matrix)
    # What the basis leaves and what the truncation cuts off share the tolerance.
    kept = _energy(found.singular_values[..., None])
    shares = ((allowed - rest).clamp_min(0) / torch.where(kept > 0, kept, 1)).sqrt()
    values = found.singular_values.reshape(-1, found.ranks[0])
    ranks = (
        tolerance_rank(member, share)
        for member, share in zip(values, shares.flatten().tolist(), strict=True)
    )
    return found.truncate(max(ranks))


def _energy(matrix: torch.Tensor) -> torch.Tensor:
    """The squared Frobenius norm of each member of a batch, float64."""
    return matrix.double().square().sum((-2, -1))
