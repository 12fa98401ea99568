"""Where a CP decomposition starts from."""

from collections.abc import Sequence
from typing import Literal

import torch

from rankfold.decompose.matrix import leading_eigenvectors
from rankfold.decompose.tucker import tucker
from rankfold.decompose.unfolding import mode_gram, mode_product, unfold
from rankfold.errors import RankError

_ASIDE = 1e-3  # the length of a nudge

Start = Literal["hosvd", "random", "eigenvalue"]


def start_factors(
    tensor: torch.Tensor, rank: int, start: Start, generator: torch.Generator
) -> list[torch.Tensor]:
    """Factors (length of the mode, rank) of a float64 tensor to start from.

    "hosvd": the leading singular vectors of each unfolding, random ones where the mode is shorter
    than the rank. "random": Gaussian. "eigenvalue": exact for exact tensors, see `_by_eigenvalue`.
    Raises ValueError for any other name, RankError where "eigenvalue" does not apply.
    """
    if start == "hosvd":
        return _by_hosvd(tensor, rank, generator)
    if start == "random":
        return [gaussian((length, rank), tensor, generator) for length in tensor.shape]
    if start == "eigenvalue":
        return _by_eigenvalue(tensor, rank, generator)
    raise ValueError(f"start must be hosvd, random, eigenvalue or a CP, not {start!r}")


def gaussian(size: Sequence[int], like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Drawn on the CPU, so that a seed means the same on every device."""
    return torch.randn(*size, dtype=torch.float64, generator=generator).to(like.device)


def nudged(factor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Columns of unit length a little aside.

    The singular vectors of terms of equal norms are as near to one as to the other: from there all
    would go to a saddle at which they are the same term, which rounding alone leaves.
    """
    return factor + _ASIDE / factor.shape[0] ** 0.5 * gaussian(factor.shape, factor, generator)


def _by_hosvd(tensor: torch.Tensor, rank: int, generator: torch.Generator) -> list[torch.Tensor]:
    factors = []
    for mode, length in enumerate(tensor.shape):
        vectors = leading_eigenvectors(mode_gram(tensor, mode))[1][:, :rank]
        missing = rank - vectors.shape[1]
        drawn = gaussian((length, missing), tensor, generator) / length**0.5
        factors.append(torch.cat([vectors, drawn], dim=1))
    return factors


def _by_eigenvalue(
    tensor: torch.Tensor, rank: int, generator: torch.Generator
) -> list[torch.Tensor]:
    """From the generalized eigenvalue problem of two slices (Sanchez and Kowalski 1990).

    In the compressed tensor, `rank` long in two modes, two random mixtures of the slices along the
    others are A D1 Bᵀ and A D2 Bᵀ with the same A and B: A holds the eigenvectors of one times the
    inverse of the other. The rest of each term is the rank-one approximation of what A leaves.
    """
    longest = sorted(range(tensor.dim()), key=lambda mode: -tensor.shape[mode])[:2]
    if tensor.dim() < 3 or min(tensor.shape[mode] for mode in longest) < rank:
        raise RankError(
            f"the eigenvalue start needs three modes, two of them at least {rank} long, not "
            + "x".join(map(str, tensor.shape))
        )
    mode, other = longest
    compressed = tucker(tensor, (rank, rank), longest, sweeps=0)
    slices = compressed.core.movedim((mode, other), (0, 1)).flatten(2)
    weights = gaussian((slices.shape[2], 2), tensor, generator)
    first, second = (slices @ weights).unbind(-1)
    values, vectors = torch.linalg.eig(first @ torch.linalg.pinv(second))
    # Conjugate pairs span with their real and imaginary parts what they span themselves.
    real = torch.where(values.imag < 0, vectors.imag, vectors.real)
    small = real / torch.linalg.vector_norm(real, dim=0).clamp_min(1e-300)
    factor = compressed.factors[0] @ small
    left = (torch.linalg.pinv(factor) @ unfold(tensor, mode)).reshape(
        rank, *(length for n, length in enumerate(tensor.shape) if n != mode)
    )
    terms = tucker(left, (1,) * (tensor.dim() - 1), sweeps=3, batch_dims=1)
    factors = [part[..., 0].mT for part in terms.factors]
    factors.insert(mode, factor * terms.core.reshape(rank))
    return factors


def exact_rank(tensor: torch.Tensor) -> int:
    """A number of terms that any tensor of this shape can be written with exactly."""
    return tensor.numel() // max(tensor.shape)


def exact_factors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensor itself as `exact_rank` terms: unit vectors in every mode but the longest."""
    longest = max(range(tensor.dim()), key=lambda mode: tensor.shape[mode])
    others = [length for mode, length in enumerate(tensor.shape) if mode != longest]
    indices = torch.cartesian_prod(*(torch.arange(length) for length in others))
    indices = indices.reshape(-1, len(others)).to(tensor.device)
    factors = [
        torch.nn.functional.one_hot(indices[:, k], length).mT.to(tensor.dtype)
        for k, length in enumerate(others)
    ]
    factors.insert(longest, unfold(tensor, longest))
    return factors


def compress(tensor: torch.Tensor, rank: int) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """The tensor in the leading singular vectors of the modes that are longer than the rank.

    The factors of a tensor of this rank lie in these subspaces (CANDELINC: Carroll, Pruzansky,
    Kruskal 1980). Returns the smaller tensor and the bases (length, rank) by mode.
    """
    bases = {}
    for mode, length in enumerate(tensor.shape):
        if length > rank:
            bases[mode] = leading_eigenvectors(mode_gram(tensor, mode))[1][:, :rank]
            tensor = mode_product(tensor, bases[mode].mT, mode)
    return tensor, bases
