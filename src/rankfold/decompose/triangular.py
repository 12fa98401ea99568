"""Triangular factorizations: Cholesky, LU and PLU."""

from dataclasses import dataclass

import torch

from rankfold.decompose.decomposition import (
    Decomposition,
    shape,
    to_unit_scale,
    working_precision,
)
from rankfold.decompose.symmetric import checked_symmetric, floored_eigh
from rankfold.errors import RankError


@dataclass(frozen=True)
class Cholesky(Decomposition):
    """matrix = lower lower.T, or nearly, if the matrix was singular."""

    lower: torch.Tensor  # (..., n, n), lower triangular, its diagonal positive
    raised: int  # eigenvalues that were raised to the floor: 0 if none had to be

    @property
    def ranks(self) -> tuple[int]:
        return (self.lower.shape[-1],)

    @property
    def batch_dims(self) -> int:
        return self.lower.dim() - 2

    @property
    def n_parameters(self) -> int:
        n = self.lower.shape[-1]
        return self.lower.numel() // (n * n) * (n * (n + 1) // 2)

    def to_tensor(self) -> torch.Tensor:
        return self.lower @ self.lower.mT

    def solve(self, right: torch.Tensor) -> torch.Tensor:
        """The solution x (..., n, columns) of matrix x = right."""
        return torch.cholesky_solve(right, self.lower)


def cholesky(matrix: torch.Tensor, floor: float = 1e-12) -> Cholesky:
    """Cholesky factor of symmetric positive semidefinite matrices (..., n, n), float64.

    Where the matrix, or one of a batch, is singular to rounding, the fallback is the factor of the
    nearest matrix whose eigenvalues are at least `floor` times the greatest (the identity for a
    zero matrix), from the QR decomposition of a square root of it; `raised` says how many had to be
    raised. Carries no gradient. Raises ValueError for what is not square, symmetric, finite and
    positive semidefinite but for rounding, or a floor outside (0, 1].
    """
    if not 0 < floor <= 1:
        raise ValueError(f"floor must lie in (0, 1], not {floor}")
    lower, failed = torch.linalg.cholesky_ex(checked_symmetric(matrix))
    if not failed.any():
        return Cholesky(lower, 0)
    eigenvalues, vectors, raised = floored_eigh(matrix, floor)
    r = torch.linalg.qr(eigenvalues.sqrt()[..., :, None] * vectors.mT).R
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(r.dtype)
    return Cholesky((signs[..., :, None] * r).mT.contiguous(), raised)


def solve_normal(normal: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
    """The x of x @ normal = product, for the symmetric positive semidefinite normal equations.

    Directions that are lost in rounding are damped, so that they take no part.
    """
    damped = normal.clone()
    damped.diagonal().add_(1e-14 * normal.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        lower = cholesky(damped).lower
    return torch.cholesky_solve(product.mT, lower).mT


@dataclass(frozen=True)
class PLU(Decomposition):
    """`matrix[rows][:, columns] = lower upper`."""

    lower: torch.Tensor  # (m, rank), lower trapezoidal, ones on the diagonal
    upper: torch.Tensor  # (rank, n), upper trapezoidal
    rows: torch.Tensor  # (m,), int64: the row of the matrix that comes at each place
    columns: torch.Tensor  # (n,), int64

    @property
    def ranks(self) -> tuple[int]:
        return (self.lower.shape[1],)

    @property
    def n_parameters(self) -> int:
        """Numbers in the two triangles, without the ones of the diagonal of `lower`."""
        rank = self.lower.shape[1]
        triangle = rank * (rank - 1) // 2
        return self.lower.numel() - rank - triangle + self.upper.numel() - triangle

    def two_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors (m, rank) and (rank, n) of the matrix itself, its order restored."""
        return self.lower[self.rows.argsort()], self.upper[:, self.columns.argsort()]

    def to_tensor(self) -> torch.Tensor:
        left, right = self.two_factors()
        return left @ right


def lu(matrix: torch.Tensor) -> PLU:
    """LU decomposition without exchange of rows or columns.

    `matrix` is (m, n), float16 to float64 (half precision is computed in float32). For matrices
    known to allow it, such as diagonally dominant ones; the errors of any other can grow, which is
    what `plu` is for. Carries no gradient. Raises RankError for what is no matrix, ValueError for
    NaN, infinity, or a pivot that vanishes.
    """
    work = _checked(matrix)
    eliminated = work.double().clone()
    smallest = torch.finfo(work.dtype).eps * eliminated.abs().max()
    for step in range(min(work.shape)):
        if eliminated[step, step].abs() <= smallest and eliminated[step:, step:].any():
            raise ValueError(f"pivot {step} of the matrix {shape(matrix)} vanishes: use plu")
        _eliminate(eliminated, step)
    kept = torch.arange(max(work.shape), device=work.device)
    return _split(eliminated, kept[: work.shape[0]], kept[: work.shape[1]], work.dtype)


def plu(matrix: torch.Tensor, *, complete: bool = False) -> PLU:
    """LU decomposition with exchange of rows: an exact split of a matrix into two factors.

    `matrix` is (m, n), float16 to float64 (half precision is computed in float32). With `complete`
    pivoting rows and columns are exchanged, and the elimination ends where what is left is
    rounding, max(m, n) times the machine epsilon of the greatest entry: the rank of the result is
    then the numerical rank. Slower: every step searches the whole rest. Carries no gradient. Raises
    RankError for what is no matrix, ValueError for NaN or infinity.
    """
    work = _checked(matrix)
    if not complete:
        scaled, scale = to_unit_scale(work)  # no quotient by a number that is hardly one
        permutation, lower, upper = torch.linalg.lu(scaled)
        rows = permutation.mT.argmax(-1)
        return PLU(lower, upper * scale, rows, torch.arange(work.shape[1], device=work.device))
    eliminated = work.double().clone()
    rows = torch.arange(work.shape[0], device=work.device)
    columns = torch.arange(work.shape[1], device=work.device)
    smallest = max(work.shape) * torch.finfo(work.dtype).eps * eliminated.abs().max().item()
    rank = 0
    while rank < min(work.shape):
        rest = eliminated[rank:, rank:].abs()
        row, column = divmod(int(rest.argmax()), rest.shape[1])
        if rest[row, column] <= smallest and rank > 0:
            break
        for table, place in ((eliminated, row), (rows, row)):
            table[[rank, rank + place]] = table[[rank + place, rank]]
        eliminated[:, [rank, rank + column]] = eliminated[:, [rank + column, rank]]
        columns[[rank, rank + column]] = columns[[rank + column, rank]]
        _eliminate(eliminated, rank)
        rank += 1
    return _split(eliminated, rows, columns, work.dtype, rank)


def _checked(matrix: torch.Tensor) -> torch.Tensor:
    if matrix.dim() != 2 or matrix.numel() == 0:
        raise RankError(f"a non-empty matrix is needed, not a tensor of shape {shape(matrix)}")
    return working_precision(matrix.detach())


def _eliminate(matrix: torch.Tensor, step: int) -> None:
    """One step of Gaussian elimination in place, the multipliers kept where the zeros come."""
    pivot = matrix[step, step]
    if pivot != 0:
        matrix[step + 1 :, step] /= pivot
    matrix[step + 1 :, step + 1 :] -= matrix[step + 1 :, step, None] * matrix[step, step + 1 :]


def _split(
    eliminated: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    dtype: torch.dtype,
    rank: int | None = None,
) -> PLU:
    rank = min(eliminated.shape) if rank is None else rank
    lower = eliminated[:, :rank].tril(-1)
    lower.diagonal().fill_(1)
    return PLU(lower.to(dtype), eliminated[:rank].triu().to(dtype), rows, columns)
