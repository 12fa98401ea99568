"""Tensors and weights for the tests of the decompositions."""

from collections.abc import Sequence

import torch
from hypothesis import strategies as st

seeds = st.integers(0, 1000)


def tensor_of(
    shape: Sequence[int], dtype: torch.dtype = torch.float64, seed: int = 0
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), dtype=torch.float64, generator=generator).to(dtype)


def weight_of(length: int, seed: int = 0, rank: int | None = None) -> torch.Tensor:
    """Symmetric positive definite with a spread of eigenvalues, or semidefinite of a rank."""
    root = tensor_of((length, length if rank is None else rank), seed=seed)
    weight = root @ root.mT
    return weight + 0.01 * torch.eye(length) if rank is None else weight


def collinear_factors(
    length: int, rank: int, congruence: float, seed: int, modes: int = 3
) -> list[torch.Tensor]:
    """Unit columns, any two of them with this inner product."""
    inner = torch.full((rank, rank), congruence, dtype=torch.float64)
    inner.diagonal().fill_(1)
    mixing = torch.linalg.cholesky(inner).mT
    return [
        torch.linalg.qr(tensor_of((length, rank), seed=seed + mode)).Q @ mixing
        for mode in range(modes)
    ]
