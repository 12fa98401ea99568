"""QR with column pivoting, and the interpolative decomposition that it gives."""

from dataclasses import dataclass

import scipy.linalg
import torch

from rankfold.decompose.matrix import relative_error, shape, working_precision
from rankfold.errors import RankError


@dataclass(frozen=True)
class PivotedQR:
    """matrix[:, permutation] = q r, the diagonal of r falling in magnitude."""

    q: torch.Tensor  # (rows, k), orthonormal columns, k = min(rows, columns)
    r: torch.Tensor  # (k, columns), upper triangular
    permutation: torch.Tensor  # (columns,), int64

    @property
    def ranks(self) -> tuple[int]:
        return (self.q.shape[1],)

    @property
    def n_parameters(self) -> int:
        return self.q.numel() + self.r.numel()

    def to_tensor(self) -> torch.Tensor:
        return (self.q @ self.r)[:, self.permutation.argsort()]

    def relative_error(self, matrix: torch.Tensor) -> float:
        """Frobenius norm of the difference, relative to that of `matrix` (0 for a zero matrix)."""
        return relative_error(self.to_tensor(), matrix)


@dataclass(frozen=True)
class Interpolative:
    """matrix ≈ matrix[:, columns] coefficients: some of its own columns span all of them."""

    skeleton: torch.Tensor  # (rows, rank), the chosen columns as they are
    columns: torch.Tensor  # (rank,), int64, which they are
    coefficients: torch.Tensor  # (rank, columns), the identity on the chosen ones

    @property
    def ranks(self) -> tuple[int]:
        return (self.columns.numel(),)

    @property
    def n_parameters(self) -> int:
        """Numbers in the skeleton and in the coefficients that are not the identity's."""
        rank = self.columns.numel()
        return self.skeleton.numel() + self.coefficients.numel() - rank**2

    def to_tensor(self) -> torch.Tensor:
        return self.skeleton @ self.coefficients

    def relative_error(self, matrix: torch.Tensor) -> float:
        """Frobenius norm of the difference, relative to that of `matrix` (0 for a zero matrix)."""
        return relative_error(self.to_tensor(), matrix)


def pivoted_qr(matrix: torch.Tensor) -> PivotedQR:
    """QR decomposition with column pivoting, by LAPACK on the CPU.

    `matrix` is (rows, columns), float16 to float64 (half precision is computed in float32); the
    result is on its device. Carries no gradient. Raises RankError for what is no matrix, ValueError
    for NaN or infinity.
    """
    if matrix.dim() != 2 or matrix.numel() == 0:
        raise RankError(f"pivoted_qr takes a non-empty matrix, not {shape(matrix)}")
    work = working_precision(matrix.detach())
    q, r, permutation = scipy.linalg.qr(work.cpu().numpy(), mode="economic", pivoting=True)
    return PivotedQR(
        torch.from_numpy(q).to(work.device),
        torch.from_numpy(r).to(work.device),
        torch.from_numpy(permutation.astype("int64")).to(work.device),
    )


def interpolative(
    matrix: torch.Tensor, rank: int | None = None, *, tolerance: float | None = None
) -> Interpolative:
    """Choose columns of the matrix that span the others (Cheng et al. 2005).

    By column-pivoted QR: the first `rank` pivots, or as many as the error, relative in the
    Frobenius norm, needs to be at most `tolerance`; by default all that the matrix has. Worse than
    the SVD at the same rank, but the factor is made of the matrix's own columns: for a layer, a
    subset of its input channels. Raises RankError for an impossible rank, ValueError for NaN,
    infinity, a tolerance outside [0, 1), or both rank and tolerance.
    """
    if rank is not None and tolerance is not None:
        raise ValueError("give at most one of rank and tolerance")
    decomposed = pivoted_qr(matrix)
    r, full = decomposed.r.double(), decomposed.ranks[0]
    if tolerance is not None:
        if not 0 <= tolerance < 1:
            raise ValueError(f"tolerance must lie in [0, 1), not {tolerance}")
        # What is left after k pivots is the block of r below and right of them.
        rows = r.square().sum(1)
        left = torch.cat([rows.flip(0).cumsum(0).flip(0), rows.new_zeros(1)])
        rank = max(1, int((left <= (tolerance**2 + 1e-15) * left[0]).int().argmax()))
    rank = full if rank is None else rank
    if not 1 <= rank <= full:
        raise RankError(f"rank {rank} is outside 1..{full}")
    # The pseudo-inverse bears a singular block: columns beyond the numerical rank add nothing.
    beyond = torch.linalg.pinv(r[:rank, :rank]) @ r[:rank, rank:]
    identity = torch.eye(rank, dtype=r.dtype, device=r.device)
    order = decomposed.permutation.argsort()
    coefficients = torch.cat([identity, beyond], dim=1)[:, order].to(decomposed.r.dtype)
    columns = decomposed.permutation[:rank]
    return Interpolative(working_precision(matrix)[:, columns], columns, coefficients)
