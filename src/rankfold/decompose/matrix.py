"""The singular value decomposition of a matrix, or of a batch of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from rankfold.decompose.decomposition import Decomposition, shape, working_precision
from rankfold.decompose.unfolding import gram
from rankfold.decompose.weights import Weights, Whitening
from rankfold.errors import RankError
from rankfold.ranks import energy_rank, tolerance_rank

# Least over greatest singular value from which on the Gram matrix alone gives orthonormal rows.
_WELL_CONDITIONED = 1e-4


@dataclass(frozen=True)
class SVD(Decomposition):
    """A truncated singular value decomposition, matrix ≈ u diag(singular_values) vh.

    Of a batch of matrices all three have the same leading dimensions, and one rank serves all.
    """

    u: torch.Tensor  # (..., rows, rank), orthonormal columns; with a weight A: u.T A u = identity
    singular_values: torch.Tensor  # (..., rank), descending
    vh: torch.Tensor  # (..., rank, columns), orthonormal where the singular value is not zero

    @property
    def ranks(self) -> tuple[int]:
        return (self.singular_values.shape[-1],)

    @property
    def batch_dims(self) -> int:
        return self.u.dim() - 2

    @property
    def n_parameters(self) -> int:
        """Numbers held by the two factors, the singular values absorbed into them."""
        return self.u.numel() + self.vh.numel()

    def truncate(self, rank: int) -> "SVD":
        """The leading `rank` terms; raises RankError outside 1..ranks[0]."""
        check_rank(rank, self.ranks[0])
        return SVD(self.u[..., :rank], self.singular_values[..., :rank], self.vh[..., :rank, :])

    def balanced(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors (..., rows, rank) and (..., rank, columns), the singular values split evenly.

        Equal norms keep the gradients of both factors alike when they are trained (the split of
        Tai et al. 2016).
        """
        root = self.singular_values.sqrt()
        return self.u * root[..., None, :], root[..., None] * self.vh

    def to_tensor(self) -> torch.Tensor:
        return (self.u * self.singular_values[..., None, :]) @ self.vh


def svd(
    matrix: torch.Tensor,
    rank: int | None = None,
    *,
    energy: float | None = None,
    tolerance: float | None = None,
    weights: Weights | None = None,
) -> SVD:
    """The best approximation of `matrix` of a rank (Eckart and Young 1936).

    `matrix` is (..., rows, columns), real, float16 to float64; half precision is computed in
    float32. Truncated to `rank`, to the least rank that keeps the share `energy` of the squared
    norm, or to the least whose error, relative in the Frobenius norm, is at most `tolerance`; by
    default not. Of a batch, the rank is the least that does so for every member. `weights` of the
    rows (0) and the columns (1) make it the best approximation in their metric, at every rank; the
    singular values, energy and tolerance are then those of A_0^½ matrix A_1^½.

    float32 goes through the eigenvectors of the smaller Gram matrix, accumulated in float64: the
    squared condition number costs half of float64's 16 digits, which still are float32's 7. At
    full rank the matrix comes back to rounding, whatever its condition, because the second factor
    is the projection of the matrix on the first and not a quotient. float64, and a matrix that
    requires gradients, go through LAPACK's SVD: the result carries the gradient, which is finite
    where the singular values differ. Raises RankError for a rank outside 1..min(rows, columns) or a
    tensor that is no matrix, ValueError for NaN or infinity, weights that do not fit, or for more
    than one of rank, energy and tolerance.
    """
    if sum(asked is not None for asked in (rank, energy, tolerance)) > 1:
        raise ValueError("give at most one of rank, energy and tolerance")
    if matrix.dim() < 2 or matrix.numel() == 0:
        raise RankError(f"svd takes a non-empty matrix, not a tensor of shape {shape(matrix)}")
    if rank is not None:
        check_rank(rank, min(matrix.shape[-2:]))
    decomposed = in_metric(partial(_leading, rank=rank), working_precision(matrix), weights)
    values = decomposed.singular_values.detach().reshape(-1, decomposed.ranks[0])
    if energy is not None:
        rank = max(energy_rank(member, energy) for member in values)
    elif tolerance is not None:
        rank = max(tolerance_rank(member, tolerance) for member in values)
    return decomposed if rank is None else decomposed.truncate(rank)


def full_rank(matrix: torch.Tensor) -> SVD:
    """W = F G with the numerical rank as the inner size: nothing is lost but rounding.

    The numerical rank counts the singular values above max(rows, columns) times the machine epsilon
    of the dtype (float32's for half precision) times the largest. `balanced()` of the result gives
    F and G. A zero matrix has rank 1; of a batch, the rank is the greatest. Raises as `svd` does.
    """
    decomposed = svd(matrix)
    values = decomposed.singular_values
    threshold = max(matrix.shape[-2:]) * torch.finfo(values.dtype).eps * values[..., :1]
    return decomposed.truncate(max(1, int((values > threshold).sum(-1).max())))


def in_metric(
    decompose: Callable[[torch.Tensor], SVD], matrix: torch.Tensor, weights: Weights | None
) -> SVD:
    """What `decompose` finds for the whitened matrix, in float64, as one of the matrix."""
    if not weights:
        return decompose(matrix)
    batch_dims = matrix.dim() - 2
    whitening = Whitening.of(matrix.shape[batch_dims:], weights)
    found = decompose(whitening.whiten(matrix.double(), batch_dims))
    return SVD(
        whitening.restore(found.u, 0).to(matrix.dtype),
        found.singular_values.to(matrix.dtype),
        whitening.restore(found.vh.mT, 1).mT.to(matrix.dtype),
    )


def check_rank(rank: int, full: int) -> None:
    if not 1 <= rank <= full:
        raise RankError(f"rank {rank} is outside 1..{full}")


def _leading(matrix: torch.Tensor, rank: int | None) -> SVD:
    """The SVD, with no more vectors than `rank` where fewer cost less."""
    if matrix.dtype == torch.float64 or matrix.requires_grad:
        return SVD(*torch.linalg.svd(matrix, full_matrices=False))
    if matrix.shape[-2] <= matrix.shape[-1]:
        return _svd_by_row_gram(matrix, rank)
    flipped = _svd_by_row_gram(matrix.mT, rank)
    return SVD(flipped.vh.mT, flipped.singular_values, flipped.u.mT)


def _svd_by_row_gram(wide: torch.Tensor, rank: int | None) -> SVD:
    """SVD of float32 matrices with no more rows than columns, through wide @ wide.T."""
    double = wide.double()
    u = leading_eigenvectors(gram(double))[1][..., :rank]
    projected = u.mT @ double
    singular_values = torch.linalg.vector_norm(projected, dim=-1)
    order = singular_values.argsort(dim=-1, descending=True, stable=True)
    singular_values = singular_values.take_along_dim(order, -1)
    if (order.diff(dim=-1) != 1).any():  # only rounding can have changed the order
        u = u.take_along_dim(order[..., None, :], -1)
        projected = projected.take_along_dim(order[..., None], -2)
    vh = projected / torch.where(singular_values > 0, singular_values, 1)[..., None]
    if (singular_values[..., -1] < _WELL_CONDITIONED * singular_values[..., 0]).any():
        # Rows of small singular values lean on those of large ones: orthogonalise in that order.
        q, r = torch.linalg.qr(vh.mT)
        vh = (q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]).mT
    return SVD(u.to(wide.dtype), singular_values.to(wide.dtype), vh.to(wide.dtype))


def leading_eigenvectors(symmetric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues, descending and not negative, and eigenvectors (columns) of Gram matrices.

    Of the Gram matrix of an unfolding's rows these are its squared singular values and its left
    singular vectors: far cheaper than the SVD of a wide matrix.
    """
    eigenvalues, eigenvectors = torch.linalg.eigh(symmetric)
    return eigenvalues.flip(-1).clamp_min(0), eigenvectors.flip(-1)
