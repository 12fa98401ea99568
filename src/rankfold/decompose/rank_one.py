"""Greedy rank-one terms, each the best approximation of what the ones before leave."""

import torch

from rankfold.decompose.cp.als import alternate
from rankfold.decompose.cp.form import CP, multiply_out
from rankfold.decompose.cp.start import exact_rank
from rankfold.decompose.cp.target import Target
from rankfold.decompose.decomposition import shape, to_unit_scale, working_precision
from rankfold.decompose.unfolding import split_point
from rankfold.decompose.weights import Weights, Whitening
from rankfold.errors import RankError

_POWER_ITERATIONS = 5


def rank_one_terms(
    tensor: torch.Tensor,
    rank: int | None = None,
    *,
    tolerance: float | None = None,
    iterations: int = 50,
    improvement: float = 1e-6,
    weights: Weights | None = None,
) -> CP:
    """A sum of outer products found one at a time (Denton et al. 2014, section 3.2).

    `tensor` has two modes or more, float16 to float64; computed in float64. `rank` terms, or as
    many as the error, relative in the Frobenius norm, needs to be at most `tolerance`. Each term is
    refined by at most `iterations` sweeps of alternating least squares, until one lowers the
    relative error of what is left by less than `improvement`. The terms come in the order in which
    they were found, so that `truncate` gives every smaller rank. At the same rank worse than `cp`,
    often by much; but the terms cannot cancel, and a rank needs no new fit. For a matrix it is
    the SVD. `weights`, one for each mode that has one, define the norm of the error. Carries no
    gradient. Raises RankError for an impossible rank, ValueError for NaN, infinity, weights that do
    not fit, a tolerance outside (0, 1), a tolerance that is out of reach, or neither or both of
    rank and tolerance.
    """
    if tensor.dim() < 2 or tensor.numel() == 0:
        raise RankError(f"rank_one_terms takes two modes or more, not {shape(tensor)}")
    if (rank is None) == (tolerance is None):
        raise ValueError("give either a rank or a tolerance")
    if tolerance is not None and not 0 < tolerance < 1:
        raise ValueError(f"tolerance must lie in (0, 1), not {tolerance}")
    if rank is not None and not 1 <= rank <= exact_rank(tensor):
        raise RankError(f"rank {rank} is outside 1..{exact_rank(tensor)}")
    work = working_precision(tensor.detach())
    whitening = Whitening.of(tensor.shape, weights)
    rest, scale = to_unit_scale(whitening.whiten(work.double()))
    allowed = 0.0 if tolerance is None else tolerance**2 * rest.square().sum().item()
    terms: list[list[torch.Tensor]] = []
    while len(terms) < (tensor.numel() if rank is None else rank):
        if rank is None and terms and rest.square().sum().item() <= allowed:
            break
        term = _term(rest, iterations, improvement)
        terms.append(term)
        rest = rest - multiply_out(term)
    factors = [
        whitening.restore(torch.cat(columns, dim=1), mode)
        for mode, columns in enumerate(zip(*terms, strict=True))
    ]
    return _in_order(factors, scale, work.dtype)


def _term(tensor: torch.Tensor, iterations: int, improvement: float) -> list[torch.Tensor]:
    """Factors (length, 1) of a rank-one approximation."""
    if not tensor.any():
        return [tensor.new_zeros(length, 1) for length in tensor.shape]
    start = [vector[:, None] for vector in _leading_vectors(tensor)]
    return alternate(Target(tensor), start, iterations, improvement)


def _leading_vectors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """A vector per mode: leading singular vectors of the tensor as a matrix, split on in turn.

    The start of the sequential rank-one approximation (da Silva, Comon, de Almeida 2015).
    """
    if tensor.dim() == 1:
        return [tensor]
    lengths = tensor.shape
    middle = split_point(lengths)
    matrix = tensor.reshape(lengths[:middle].numel(), -1)
    right = matrix[torch.linalg.vector_norm(matrix, dim=1).argmax()]
    for _ in range(_POWER_ITERATIONS):
        left = torch.nn.functional.normalize(matrix @ right, dim=0)
        right = matrix.mT @ left
    return [
        *_leading_vectors(left.reshape(lengths[:middle])),
        *_leading_vectors(right.reshape(lengths[middle:])),
    ]


def _in_order(factors: list[torch.Tensor], scale: float, dtype: torch.dtype) -> CP:
    norms = torch.stack([torch.linalg.vector_norm(factor, dim=0) for factor in factors])
    unit = [
        (factor / torch.where(norm > 0, norm, 1)).to(dtype).contiguous()
        for factor, norm in zip(factors, norms, strict=True)
    ]
    return CP((norms.prod(0) * scale).to(dtype), tuple(unit))
