"""Singular value decomposition of a tall or wide matrix spread over a cluster, through Dask.

Needs the extra `dask`. A matrix on one machine, in memory or not, is `tall_skinny_svd`'s.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from rankfold.decompose.matrix import check_rank
from rankfold.errors import RankError, TensorError
from rankfold.ranks import energy_rank, tolerance_rank

if TYPE_CHECKING:
    import dask.array as da


@dataclass(frozen=True)
class ClusterSVD:
    """matrix ≈ u diag(singular_values) vh; the long factor stays where it was computed."""

    u: "da.Array"  # (rows, rank), orthonormal columns
    singular_values: torch.Tensor  # (rank,), descending
    vh: "da.Array"  # (rank, columns), orthonormal rows

    @property
    def ranks(self) -> tuple[int]:
        return (self.singular_values.numel(),)

    @property
    def n_parameters(self) -> int:
        """Numbers held by the two factors, the singular values absorbed into them."""
        return int(self.u.size + self.vh.size)


def cluster_svd(
    matrix: "da.Array",
    rank: int | None = None,
    *,
    energy: float | None = None,
    tolerance: float | None = None,
) -> ClusterSVD:
    """SVD of a Dask array with one long side, by TSQR over its blocks on Dask's workers.

    `matrix` is (rows, columns), float32 or float64, chunked along its longer side alone (or is
    rechunked so). `rank`, `energy` and `tolerance` truncate as in `rankfold.decompose.svd`. The
    factors are Dask arrays that the workers hold; the singular values are here. Runs where the
    current Dask scheduler runs. Raises ImportError without the extra `dask`, RankError for an
    impossible rank or shape, ValueError for NaN, infinity, or more than one of rank, energy and
    tolerance.
    """
    try:
        import dask
        import dask.array as da
    except ImportError as error:
        raise ImportError("cluster_svd needs Dask: pip install 'rankfold[dask]'") from error

    if sum(asked is not None for asked in (rank, energy, tolerance)) > 1:
        raise ValueError("give at most one of rank, energy and tolerance")
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise RankError(f"cluster_svd takes a non-empty matrix, not one of shape {matrix.shape}")
    if rank is not None:
        check_rank(rank, min(matrix.shape))
    short = int(matrix.shape[0] > matrix.shape[1])
    u, values, vh = dask.persist(*da.linalg.svd(matrix.rechunk({short: -1})))
    try:
        singular_values = torch.from_numpy(values.compute())
    except np.linalg.LinAlgError as error:
        raise TensorError(f"the matrix of shape {matrix.shape} holds NaN or infinity") from error
    if not torch.isfinite(singular_values).all():
        raise TensorError(f"the matrix of shape {matrix.shape} holds NaN or infinity")
    if energy is not None:
        rank = energy_rank(singular_values, energy)
    elif tolerance is not None:
        rank = tolerance_rank(singular_values, tolerance)
    rank = singular_values.numel() if rank is None else rank
    return ClusterSVD(u[:, :rank], singular_values[:rank].clone(), vh[:rank])
