"""Decompositions of a matrix."""

from dataclasses import dataclass

import torch

from rankfold.errors import RankError
from rankfold.ranks import energy_rank, tolerance_rank

# Least over greatest singular value from which on the Gram matrix alone gives orthonormal rows.
_WELL_CONDITIONED = 1e-4


@dataclass(frozen=True)
class SVD:
    """A truncated singular value decomposition, matrix ≈ u diag(singular_values) vh."""

    u: torch.Tensor  # (rows, rank), orthonormal columns
    singular_values: torch.Tensor  # (rank,), descending
    vh: torch.Tensor  # (rank, columns), orthonormal rows where the singular value is not zero

    @property
    def ranks(self) -> tuple[int]:
        return (self.singular_values.numel(),)

    @property
    def n_parameters(self) -> int:
        """Numbers held by the two factors, the singular values absorbed into them."""
        return self.u.numel() + self.vh.numel()

    def truncate(self, rank: int) -> "SVD":
        """The leading `rank` terms; raises RankError outside 1..ranks[0]."""
        if not 1 <= rank <= self.ranks[0]:
            raise RankError(f"rank {rank} is outside 1..{self.ranks[0]}")
        return SVD(self.u[:, :rank], self.singular_values[:rank], self.vh[:rank])

    def balanced(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors (rows, rank) and (rank, columns), the singular values split evenly.

        Equal norms keep the gradients of both factors alike when they are trained (the split of
        Tai et al. 2016).
        """
        root = self.singular_values.sqrt()
        return self.u * root, root[:, None] * self.vh

    def to_tensor(self) -> torch.Tensor:
        return (self.u * self.singular_values) @ self.vh

    def relative_error(self, matrix: torch.Tensor) -> float:
        """Frobenius norm of the difference, relative to that of `matrix` (0 for a zero matrix)."""
        return relative_error(self.to_tensor(), matrix)


def svd(
    matrix: torch.Tensor,
    rank: int | None = None,
    *,
    energy: float | None = None,
    tolerance: float | None = None,
) -> SVD:
    """The best approximation of `matrix` of a rank (Eckart and Young 1936).

    `matrix` is (rows, columns), real, float16 to float64; half precision is computed in float32.
    Truncated to `rank`, to the least rank that keeps the share `energy` of the squared norm, or to
    the least whose error, relative in the Frobenius norm, is at most `tolerance`; by default not.
    float32 goes through the eigenvectors of the smaller Gram matrix, accumulated in float64: the
    squared condition number costs half of float64's 16 digits, which still are float32's 7. At
    full rank the matrix comes back to rounding, whatever its condition, because the second factor
    is the projection of the matrix on the first and not a quotient. float64 goes through LAPACK's
    SVD. Raises RankError for a rank outside 1..min(rows, columns) or a tensor that is no matrix,
    ValueError for NaN or infinity, or for more than one of rank, energy and tolerance.
    """
    if sum(asked is not None for asked in (rank, energy, tolerance)) > 1:
        raise ValueError("give at most one of rank, energy and tolerance")
    if matrix.dim() != 2 or matrix.numel() == 0:
        raise RankError(f"svd takes a non-empty matrix, not a tensor of shape {shape(matrix)}")
    work = working_precision(matrix)
    if work.dtype == torch.float64:
        decomposed = SVD(*torch.linalg.svd(work, full_matrices=False))
    elif work.shape[0] <= work.shape[1]:
        decomposed = _svd_by_row_gram(work)
    else:
        flipped = _svd_by_row_gram(work.mT)
        decomposed = SVD(flipped.vh.mT, flipped.singular_values, flipped.u.mT)
    if energy is not None:
        rank = energy_rank(decomposed.singular_values, energy)
    elif tolerance is not None:
        rank = tolerance_rank(decomposed.singular_values, tolerance)
    return decomposed if rank is None else decomposed.truncate(rank)


def full_rank(matrix: torch.Tensor) -> SVD:
    """W = F G with the numerical rank as the inner size: nothing is lost but rounding.

    The numerical rank counts the singular values above max(rows, columns) times the machine epsilon
    of the dtype (float32's for half precision) times the largest. `balanced()` of the result gives
    F and G. A zero matrix has rank 1. Raises as `svd` does.
    """
    decomposed = svd(matrix)
    values = decomposed.singular_values
    threshold = max(matrix.shape) * torch.finfo(values.dtype).eps * values[0]
    return decomposed.truncate(max(1, int((values > threshold).sum())))


def _svd_by_row_gram(wide: torch.Tensor) -> SVD:
    """SVD of a float32 matrix with no more rows than columns, through wide @ wide.T."""
    _, u = gram_eigenvectors(wide)
    projected = u.mT @ wide.double()
    singular_values = torch.linalg.vector_norm(projected, dim=1)
    order = singular_values.argsort(descending=True, stable=True)
    u, projected, singular_values = u[:, order], projected[order], singular_values[order]
    vh = projected / torch.where(singular_values > 0, singular_values, 1)[:, None]
    if singular_values[-1] < _WELL_CONDITIONED * singular_values[0]:
        # Rows of small singular values lean on those of large ones: orthogonalise in that order.
        q, r = torch.linalg.qr(vh.mT)
        vh = (q * r.diagonal().sign()).mT
    return SVD(u.to(wide.dtype), singular_values.to(wide.dtype), vh.to(wide.dtype))


def gram_eigenvectors(unfolding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues (descending, float64) and eigenvectors (columns) of unfolding @ unfolding.T.

    The eigenvectors are the left singular vectors of the unfolding, the eigenvalues its squared
    singular values: far cheaper than the SVD of a wide matrix.
    """
    double = unfolding.double()
    eigenvalues, eigenvectors = torch.linalg.eigh(double @ double.mT)
    return eigenvalues.flip(0).clamp_min(0), eigenvectors.flip(1)


def working_precision(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32 (from half precision) or as it is (float32, float64), and finite.

    Raises ValueError for other dtypes, NaN and infinity.
    """
    if tensor.dtype in (torch.float16, torch.bfloat16):
        tensor = tensor.float()
    if tensor.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"decompositions take real floating-point tensors, not {tensor.dtype}")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"the tensor of shape {shape(tensor)} holds NaN or infinity")
    return tensor


def relative_error(approximation: torch.Tensor, tensor: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of `tensor`, in float64 (0 if both are 0)."""
    difference = torch.linalg.vector_norm(approximation.double() - tensor.double()).item()
    norm = torch.linalg.vector_norm(tensor.double()).item()
    return difference / norm if norm > 0 else difference


def shape(tensor: torch.Tensor) -> str:
    """A shape as people write it: 64x32x3x3."""
    return "x".join(map(str, tensor.shape)) or "scalar"
