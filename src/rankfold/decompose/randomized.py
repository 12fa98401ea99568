"""Singular value decomposition of large matrices of low rank, by random sketches.

Halko, Martinsson, Tropp: Finding structure with randomness. SIAM Review 53 (2011). Block Krylov:
Musco, Musco: Randomized block Krylov methods. NeurIPS 2015. Adaptive rank: Yu, Gu, Li: Efficient
randomized algorithms for the fixed-precision low-rank matrix approximation. SIMAX 39 (2018).
"""

import math

import torch

from rankfold.decompose.matrix import SVD, shape, svd, working_precision
from rankfold.errors import RankError
from rankfold.ranks import tolerance_rank


def randomized_svd(
    matrix: torch.Tensor,
    rank: int | None = None,
    *,
    tolerance: float | None = None,
    oversampling: int = 10,
    power_iterations: int = 2,
    block_krylov: bool = False,
    seed: int = 0,
) -> SVD:
    """A near-optimal approximation of a large matrix, at the cost of a few products with it.

    `matrix` is (rows, columns), float16 to float64 (half precision is computed in float32). Give
    either `rank` or `tolerance`, the relative Frobenius error to keep, for which the rank is grown
    until it is kept and then cut to the least that keeps it. The sketch holds
    `oversampling` columns more than the rank and is sharpened by `power_iterations` products with
    matrix @ matrix.T, re-orthonormalised in between; `block_krylov` keeps the blocks of all
    iterations instead of the last, better for slowly decaying spectra and dearer by their number.
    The same seed gives the same result. For small matrices, or ranks near full, `svd` is faster and
    exact. Raises RankError for an impossible rank, ValueError for NaN, infinity, or neither or both
    of rank and tolerance.
    """
    if matrix.dim() != 2 or matrix.numel() == 0:
        raise RankError(f"randomized_svd takes a non-empty matrix, not {shape(matrix)}")
    if (rank is None) == (tolerance is None):
        raise ValueError("give either a rank or a tolerance")
    work = working_precision(matrix)
    full = min(work.shape)
    generator = torch.Generator(work.device).manual_seed(seed)
    if rank is not None:
        if not 1 <= rank <= full:
            raise RankError(f"rank {rank} is outside 1..{full}")
        start = _sketch(work, min(rank + oversampling, full), generator)
        basis = _range(work, start, power_iterations, block_krylov)
        return _on_range(work, basis).truncate(rank)
    assert tolerance is not None
    least = 10 * torch.finfo(work.dtype).eps
    if not least <= tolerance < 1:
        raise ValueError(f"tolerance must lie in [{least:.1e}, 1), not {tolerance}")
    return _adaptive(work, tolerance, power_iterations, generator)


def residual_norm_bound(
    decomposition: SVD, matrix: torch.Tensor, *, probes: int = 10, seed: int = 0
) -> float:
    """An upper bound of the spectral norm of the error, without forming the error.

    Holds with probability 1 - 10^-probes (Halko et al., equation 4.3), at the cost of `probes`
    products with the matrix; on average some ten times above the true norm.
    """
    work = working_precision(matrix)
    generator = torch.Generator(work.device).manual_seed(seed)
    gaussian = torch.randn(
        work.shape[1], probes, dtype=work.dtype, device=work.device, generator=generator
    )
    scaled = decomposition.singular_values[:, None] * (decomposition.vh @ gaussian)
    errors = work @ gaussian - decomposition.u @ scaled
    longest = torch.linalg.vector_norm(errors.double(), dim=0).max().item()
    return 10 * math.sqrt(2 / math.pi) * longest


def _sketch(matrix: torch.Tensor, width: int, generator: torch.Generator) -> torch.Tensor:
    """Products of the matrix with `width` Gaussian vectors: (rows, width)."""
    gaussian = torch.randn(
        matrix.shape[1], width, dtype=matrix.dtype, device=matrix.device, generator=generator
    )
    return matrix @ gaussian


def _orthonormal(columns: torch.Tensor) -> torch.Tensor:
    return torch.linalg.qr(columns).Q


def _range(
    matrix: torch.Tensor, start: torch.Tensor, iterations: int, block_krylov: bool
) -> torch.Tensor:
    """Orthonormal columns that hold most of the matrix: (rows, at most min(rows, columns))."""
    basis = _orthonormal(start)
    blocks = [basis]
    for _ in range(iterations):
        basis = _orthonormal(matrix @ _orthonormal(matrix.mT @ basis))
        blocks.append(basis)
    if not block_krylov:
        return basis
    return _orthonormal(torch.cat(blocks, dim=1)[:, : min(matrix.shape)])


def _on_range(matrix: torch.Tensor, basis: torch.Tensor) -> SVD:
    """The SVD of the projection of the matrix on the span of the orthonormal columns."""
    small = svd(basis.mT @ matrix)
    return SVD(basis @ small.u, small.singular_values, small.vh)


def _adaptive(
    matrix: torch.Tensor, tolerance: float, iterations: int, generator: torch.Generator
) -> SVD:
    """Grow an orthonormal basis block by block until what it leaves is within the tolerance.

    What is left is kept as a matrix: its norm, unlike the difference of two large sums, is known to
    rounding.
    """
    allowed = tolerance**2 * matrix.double().square().sum().item()
    full = min(matrix.shape)
    basis = matrix.new_zeros(matrix.shape[0], 0)
    left = matrix.clone()
    width = 32
    while True:
        block = _sketch(left, min(width, full - basis.shape[1]), generator)
        for _ in range(iterations):
            block = left @ _orthonormal(left.mT @ _orthonormal(block))
        # Twice: once leaves rounding errors along the basis that the block then keeps.
        for _ in range(2):
            block = _orthonormal(block - basis @ (basis.mT @ block))
        basis = torch.cat([basis, block], dim=1)
        left -= block @ (block.mT @ left)
        rest = left.double().square().sum().item()
        if rest <= allowed or basis.shape[1] == full:
            break
        width *= 2
    found = _on_range(matrix, basis)
    # What the basis leaves and what the truncation cuts off share the tolerance.
    kept = found.singular_values.double().square().sum().item()
    share = max(allowed - rest, 0.0) / kept if kept else 0.0
    return found.truncate(tolerance_rank(found.singular_values, math.sqrt(share)))
