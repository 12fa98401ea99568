"""Square roots of symmetric positive semidefinite matrices, by their eigenvectors."""

from dataclasses import dataclass

import torch

from rankfold.errors import TensorError

# Least over greatest eigenvalue from which on a negative one is no rounding error.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class SymmetricRoots:
    """The symmetric square root of a matrix and its inverse, both (..., n, n), float64."""

    root: torch.Tensor
    inverse_root: torch.Tensor
    raised: int  # eigenvalues that lay below the floor and were raised to it


def symmetric_roots(matrix: torch.Tensor, floor: float = 1e-12) -> SymmetricRoots:
    """A^½ and A^-½ of symmetric positive semidefinite matrices (..., n, n), in float64.

    Eigenvalues below `floor` times the greatest are raised to it, so that a singular matrix has an
    inverse root too; a zero matrix is taken for the identity. Carries no gradient. Raises
    ValueError for what is not square, symmetric, finite and positive semidefinite but for
    rounding, or a floor outside (0, 1].
    """
    eigenvalues, vectors, raised = floored_eigh(matrix, floor)
    roots = eigenvalues.sqrt()[..., None, :]
    return SymmetricRoots((vectors * roots) @ vectors.mT, (vectors / roots) @ vectors.mT, raised)


def floored_eigh(matrix: torch.Tensor, floor: float) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Eigenvalues (ascending, none below the floor), eigenvectors, and how many were raised."""
    if not 0 < floor <= 1:
        raise ValueError(f"floor must lie in (0, 1], not {floor}")
    checked = checked_symmetric(matrix)
    eigenvalues, vectors = torch.linalg.eigh(checked)
    greatest = eigenvalues[..., -1:]
    if (eigenvalues[..., :1] < -_ROUNDING * checked.abs().amax((-2, -1))[..., None]).any():
        least = eigenvalues[..., 0].min().item()
        raise ValueError(
            f"a matrix is not positive semidefinite: it has the eigenvalue {least:.3g}"
        )
    least = torch.where(greatest > 0, floor * greatest, 1)
    raised = int((eigenvalues < least).sum())
    return torch.maximum(eigenvalues, least), vectors, raised


def checked_symmetric(matrix: torch.Tensor) -> torch.Tensor:
    """The matrices in float64, symmetric to the last digit; ValueError if they are far from it."""
    name = "x".join(map(str, matrix.shape))
    if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2] or matrix.numel() == 0:
        raise ValueError(f"a square matrix is needed, not one of shape {name}")
    double = matrix.detach().double()
    if not torch.isfinite(double).all():
        raise TensorError(f"the symmetric matrix {name} holds NaN or infinity")
    size = double.abs().amax((-2, -1), keepdim=True)
    if ((double - double.mT).abs() > _ROUNDING * size).any():
        raise ValueError(f"the matrix {name} is not symmetric")
    return (double + double.mT) / 2
