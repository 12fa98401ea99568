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
    oversampling: int | None = None,
    iterations: int = 2,
    block_krylov: bool = True,
    weights: Weights | None = None,
    seed: int = 0,
) -> SVD:
    """A near-optimal approximation of a large matrix, at the cost of a few products with it.

    `matrix` is (..., rows, columns), float16 to float64 (half precision is computed in float32).
    Give either `rank` or `tolerance`, the relative Frobenius error to keep, for which the rank is
    grown until it is kept (by every member of a batch) and then cut to the least that keeps it. The
    sketch is sharpened by `iterations` products with matrix @ matrix.T, re-orthonormalised in
    between. `block_krylov` keeps the blocks of all iterations instead of the last alone: the same
    number of products (less one) and a smaller error, for memory of `iterations` further blocks.
    The sketch holds `oversampling` columns more than the rank: 10 by default, and none where
    further blocks do as much. `weights` are those of `svd`. The same seed
    gives the same result. Carries no gradient. For small matrices, or ranks near full, `svd` is
    faster and exact. Raises RankError for an impossible rank, ValueError for NaN, infinity, or
    neither or both of rank and tolerance.
    """
    if matrix.dim() < 2 or matrix.numel() == 0:
        raise RankError(f"randomized_svd takes a non-empty matrix, not {shape(matrix)}")
    if (rank is None) == (tolerance is None):
        raise ValueError("give either a rank or a tolerance")
    if (oversampling or 0) < 0 or iterations < 0:
        raise ValueError("oversampling and iterations must not be negative")
    work = working_precision(matrix.detach())
    generator = torch.Generator(work.device).manual_seed(seed)
    if rank is not None:
        check_rank(rank, min(work.shape[-2:]))
        krylov = block_krylov and iterations > 0
        if oversampling is None:
            oversampling = 0 if krylov else 10
        find = partial(
            _by_block_krylov if krylov else _by_power,
            rank=rank,
            width=min(rank + oversampling, *work.shape[-2:]),
            iterations=iterations,
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


def _by_power(
    matrix: torch.Tensor, rank: int, width: int, iterations: int, generator: torch.Generator
) -> SVD:
    """From the last of 2 iterations + 1 products with a random block (Halko et al. 2011)."""
    basis = _orthonormal(matrix @ _gaussian(matrix, width, generator))
    for _ in range(iterations):
        basis = _orthonormal(matrix @ _orthonormal(matrix.mT @ basis))
    return _from_projection(basis, basis.mT @ matrix, rank)


def _by_block_krylov(
    matrix: torch.Tensor, rank: int, width: int, iterations: int, generator: torch.Generator
) -> SVD:
    """From a random block and what matrix.T @ matrix makes of it, again and again.

    The products with the matrix that build the basis of the row space are also those that the
    decomposition is made of, so that it costs one product less than power iteration.
    """
    basis = _orthonormal(_gaussian(matrix, width, generator))
    images = [matrix @ basis]
    for _ in range(iterations):
        room = matrix.shape[-1] - basis.shape[-1]
        if room == 0:
            break
        # The columns of an image span the same as those of any basis of them.
        block = matrix.mT @ _orthonormal(images[-1])
        block = _orthonormal_to(basis, block[..., :room])
        basis = torch.cat([basis, block], dim=-1)
        images.append(matrix @ block)
    small = svd(torch.cat(images, dim=-1), rank)
    return SVD(small.u, small.singular_values, small.vh @ basis.mT)


def _from_projection(basis: torch.Tensor, projected: torch.Tensor, rank: int | None = None) -> SVD:
    """The SVD of basis @ projected, for orthonormal columns and projected = basis.T @ matrix."""
    small = svd(projected, rank)
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
