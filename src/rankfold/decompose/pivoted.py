"""QR with column pivoting, and the interpolative decomposition that it gives."""

from dataclasses import dataclass

import scipy
import torch

from rankfold.decompose.decomposition import Decomposition, shape, working_precision
from rankfold.decompose.matrix import check_rank
from rankfold.decompose.weights import Weights, Whitening
from rankfold.errors import RankError


@dataclass(frozen=True)
class PivotedQR(Decomposition):
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


@dataclass(frozen=True)
class Interpolative(Decomposition):
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
    matrix: torch.Tensor,
    rank: int | None = None,
    *,
    tolerance: float | None = None,
    weights: Weights | None = None,
) -> Interpolative:
    """Choose columns of the matrix that span the others (Cheng et al. 2005).

    `matrix` is (rows, columns), float16 to float64. The first `rank` columns in the order of a
    column-pivoted QR, or as many as the error, relative in the Frobenius norm, needs to be at most
    `tolerance`; by default all that are independent of each other. Worse than the SVD at the same
    rank, but the factor is made of the matrix's own columns: for a layer, a subset of its input
    channels. `weights` of the rows (0) and the columns (1) define the norm of the error; with a
    weight of the columns each step takes the column that lowers the weighted error most (Farahat
    et al. 2013, greedy column subset selection). Carries no gradient. Raises RankError for an
    impossible rank, ValueError for NaN, infinity, a tolerance outside [0, 1), or both rank and
    tolerance.
    """
    if rank is not None and tolerance is not None:
        raise ValueError("give at most one of rank and tolerance")
    if tolerance is not None and not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must lie in [0, 1), not {tolerance}")
    if matrix.dim() != 2 or matrix.numel() == 0:
        raise RankError(f"interpolative takes a non-empty matrix, not {shape(matrix)}")
    work = working_precision(matrix.detach())
    if rank is not None:
        check_rank(rank, min(work.shape))
    whitening = Whitening.of(work.shape, weights)
    candidates = work.double()
    if 0 in whitening.roots:
        candidates = whitening.roots[0] @ candidates
    if 1 in whitening.roots:
        order, left = _greedy_order(candidates, candidates @ whitening.roots[1])
    else:
        order, left = _pivoted_order(candidates)
    if rank is None:
        rank = _first_within(left, 0.0 if tolerance is None else tolerance)
    columns = order[:rank]
    # The pseudo-inverse bears columns that depend on each other.
    coefficients = torch.linalg.pinv(candidates[:, columns]) @ candidates
    coefficients[:, columns] = torch.eye(rank, dtype=candidates.dtype, device=candidates.device)
    return Interpolative(work[:, columns], columns, coefficients.to(work.dtype))


def _pivoted_order(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns in the order of a pivoted QR, and the squared error after 0, 1, ... of them."""
    decomposed = pivoted_qr(matrix)
    # What is left after k pivots is the block of r below and right of them.
    rows = decomposed.r.square().sum(1)
    left = torch.cat([rows.flip(0).cumsum(0).flip(0), rows.new_zeros(1)])
    return decomposed.permutation, left


def _greedy_order(
    candidates: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of `candidates`, each the one that explains most of what is left of `target`.

    Returns them and the squared norm of what is left of the target after 0, 1, ... of them.
    """
    candidates, target = candidates.clone(), target.clone()
    chosen: list[int] = []
    left = [target.square().sum().item()]
    gains = (target.mT @ candidates).square().sum(0)
    lengths = candidates.square().sum(0)
    negligible = torch.finfo(candidates.dtype).eps * max(candidates.shape) * lengths.max()
    for _ in range(min(candidates.shape)):
        scores = torch.where(lengths > negligible, gains / lengths.clamp_min(negligible), -1.0)
        scores[chosen] = -2.0  # a column is taken once, and last where it adds nothing
        best = int(scores.argmax())
        chosen.append(best)
        if lengths[best] > negligible:
            direction = candidates[:, best] / torch.linalg.vector_norm(candidates[:, best])
            along = target.mT @ direction
            shares = direction @ candidates
            gains += shares.square() * (along @ along) - 2 * shares * (
                candidates.mT @ (target @ along)
            )
            candidates -= direction[:, None] * shares
            target -= direction[:, None] * along
            lengths = candidates.square().sum(0)
        left.append(target.square().sum().item())
    return torch.tensor(chosen, device=target.device), target.new_tensor(left)


def _first_within(left: torch.Tensor, tolerance: float) -> int:
    """The least count from 1 on whose squared error is within the tolerance, but for rounding."""
    return max(1, int((left <= (tolerance**2 + 1e-15) * left[0]).int().argmax()))
