"""The Tucker decomposition on all or on chosen modes.

De Lathauwer, De Moor, Vandewalle: A multilinear singular value decomposition (HOSVD), and On the
best rank-1 and rank-(R1, ..., RN) approximation of higher-order tensors (HOOI). SIMAX 21 (2000).
Vannieuwenhoven, Vandebril, Meerbergen: A new truncation strategy for the higher-order singular
value decomposition (ST-HOSVD). SISC 34 (2012).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rankfold.decompose.budget import Budget, energies
from rankfold.decompose.decomposition import (
    Decomposition,
    shape,
    to_unit_scale,
    working_precision,
)
from rankfold.decompose.matrix import leading_eigenvectors
from rankfold.decompose.unfolding import mode_gram, mode_product, project
from rankfold.decompose.weights import Weights, Whitening
from rankfold.errors import RankError

# Up to this length all eigenvectors of a mode cost less than iterating towards the leading ones.
_SHORT = 128
# How far each update of a factor is followed beyond itself, as a share of the step.
_MOMENTUM = 0.3
# Relative errors above this one are known to their digits in float32.
_COARSE = 1e-2


@dataclass(frozen=True)
class Tucker(Decomposition):
    """A decomposition: tensor ≈ core x_m1 factors[0] x_m2 factors[1] ... over `modes`.

    Of a batch the core and the factors have the same leading dimensions, not counted by `modes`.
    """

    core: torch.Tensor  # (..., as the tensor, but `ranks[k]` long in mode `modes[k]`)
    factors: tuple[torch.Tensor, ...]
    """Each (..., length of the mode, rank), columns orthonormal (with a weight A: F.T A F = I)."""
    modes: tuple[int, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(factor.shape[-1] for factor in self.factors)

    @property
    def batch_dims(self) -> int:
        return self.factors[0].dim() - 2 if self.factors else 0

    @property
    def n_parameters(self) -> int:
        return self.core.numel() + sum(factor.numel() for factor in self.factors)

    def to_tensor(self) -> torch.Tensor:
        tensor = self.core
        for mode, factor in zip(self.modes, self.factors, strict=True):
            tensor = mode_product(tensor, factor, mode, self.batch_dims)
        return tensor


def tucker(
    tensor: torch.Tensor,
    ranks: Sequence[int] | None = None,
    modes: Sequence[int] | None = None,
    *,
    tolerance: float | None = None,
    sweeps: int = 50,
    improvement: float = 2e-4,
    weights: Weights | None = None,
    batch_dims: int = 0,
) -> Tucker:
    """Tucker decomposition: ST-HOSVD, refined by higher-order orthogonal iteration (HOOI).

    `tensor` has any order, float16 to float64 (half precision is computed in float32); its first
    `batch_dims` dimensions count the members of a batch. `modes` defaults to all of them. Give
    `ranks`, one per mode; or `tolerance`, the relative Frobenius error to keep, for which the
    ST-HOSVD's ranks are lowered as far as its refinement leaves room; by default nothing is
    truncated and this is the HOSVD, whose leading blocks are truncated HOSVDs of every smaller rank
    (De Lathauwer et al. 2000a, property 10). At most `sweeps` rounds of HOOI follow (none:
    ST-HOSVD), until one lowers the relative error by less than `improvement`. `weights`, one for
    each mode that has one, define the norm of the error.

    Computed in float64 from mode Gram matrices, never from the SVD of a wide unfolding. Carries no
    gradient. Raises RankError for ranks or modes that the tensor does not have, ValueError for NaN,
    infinity, weights that do not fit, a tolerance outside [0, 1), or both ranks and tolerance.
    """
    if not 0 <= batch_dims <= tensor.dim() or tensor.numel() == 0:
        raise RankError(f"no {batch_dims} batch dimensions and modes in shape {shape(tensor)}")
    lengths = tensor.shape[batch_dims:]
    modes = tuple(range(len(lengths))) if modes is None else tuple(modes)
    if len(set(modes)) != len(modes) or not all(0 <= mode < len(lengths) for mode in modes):
        raise RankError(f"modes {modes} are not modes of a tensor of shape {shape(tensor)}")
    full = tuple(lengths[mode] for mode in modes)
    if ranks is not None and tolerance is not None:
        raise ValueError("give at most one of ranks and tolerance")
    ranks = full if ranks is None else tuple(ranks)
    if len(ranks) != len(modes) or not all(
        1 <= rank <= length for rank, length in zip(ranks, full, strict=False)
    ):
        raise RankError(
            f"ranks {ranks} do not fit modes {modes} of a tensor of shape {shape(tensor)}"
        )
    if tolerance is not None and not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must lie in [0, 1), not {tolerance}")
    work = working_precision(tensor.detach())
    whitening = Whitening.of(lengths, weights)
    scaled, scale = to_unit_scale(whitening.whiten(work, batch_dims))
    # The first and the last mode of a tensor are multiplied in one product, without a copy.
    order = [*modes[:1], *(mode for mode in range(len(lengths)) if mode not in modes), *modes[1:]]
    axes = [*range(batch_dims), *(batch_dims + mode for mode in order)]
    moved = scaled.permute(axes).contiguous()
    chosen = tuple(order.index(mode) for mode in modes)
    request = _Request(chosen, ranks, tolerance, sweeps, improvement, batch_dims)
    core, factors = _decompose(moved, request)
    core = scale * core.permute([axes.index(axis) for axis in range(len(axes))])
    for mode in whitening.roots.keys() - set(modes):
        core = mode_product(core, whitening.inverse_roots[mode], mode, batch_dims)
    restored = [
        whitening.restore(factor, mode) for mode, factor in zip(modes, factors, strict=True)
    ]
    return Tucker(
        core.to(work.dtype).contiguous(),
        tuple(factor.to(work.dtype).contiguous() for factor in restored),
        modes,
    )


@dataclass(frozen=True)
class _Request:
    modes: tuple[int, ...]
    ranks: tuple[int, ...]
    tolerance: float | None
    sweeps: int
    improvement: float
    batch_dims: int


def _decompose(tensor: torch.Tensor, request: _Request) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Core and factors, in the order of the modes.

    In float32 if the tensor is, and cut so deeply that float32 sees all of the error.
    """
    if tensor.dtype == torch.float32 and _cuts_deeply(tensor, request):
        factors, error = _search(tensor, request)
        if error > _COARSE:
            return _finish(tensor, factors, request)
    tensor = tensor.double()
    return _finish(tensor, _search(tensor, request)[0], request)


def _cuts_deeply(tensor: torch.Tensor, request: _Request) -> bool:
    if request.tolerance is not None:
        return request.tolerance > 2 * _COARSE
    lengths = [tensor.shape[request.batch_dims + mode] for mode in request.modes]
    return request.ranks != tuple(lengths)


def _search(tensor: torch.Tensor, request: _Request) -> tuple[list[torch.Tensor], float]:
    """The factors, in the order of the modes, and the relative error with them."""
    factors, kept = _st_hosvd(tensor, request)
    total = _squared_norm(tensor)
    if total == 0:
        return [factors[mode] for mode in request.modes], 0.0
    return _hooi(tensor, factors, total, kept, request)


def _finish(
    tensor: torch.Tensor, factors: Sequence[torch.Tensor], request: _Request
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The core of the factors, both cut as far as the tolerance allows."""
    core = project(tensor, factors, request.modes, batch_dims=request.batch_dims)
    if request.tolerance is None:
        return core, list(factors)
    return _trim(tensor, core, factors, request)


def _squared_norm(tensor: torch.Tensor) -> float:
    rows = torch.linalg.vector_norm(tensor.flatten(1), dim=1)
    return rows.double().square().sum().item()


def _st_hosvd(tensor: torch.Tensor, request: _Request) -> tuple[dict[int, torch.Tensor], float]:
    """One factor per mode, each for what the ones before leave, and the squared norm kept.

    Short modes first.
    """
    factors: dict[int, torch.Tensor] = {}
    batch_dims = request.batch_dims
    limits = dict(zip(request.modes, request.ranks, strict=True))
    budget = Budget.of(tensor, request.tolerance, batch_dims)
    in_order = sorted(request.modes, key=lambda mode: tensor.shape[batch_dims + mode])
    for done, mode in enumerate(in_order):
        eigenvalues, vectors = leading_eigenvectors(mode_gram(tensor, mode, batch_dims))
        rank = budget.truncate(eigenvalues, limits[mode], len(in_order) - done)
        factors[mode] = vectors[..., :rank]
        kept = eigenvalues[..., :rank].double().sum().item()
        if done + 1 < len(in_order):
            tensor = mode_product(tensor, factors[mode].mT, mode, batch_dims)
    return factors, kept


def _hooi(
    tensor: torch.Tensor,
    factors: dict[int, torch.Tensor],
    total: float,
    kept: float,
    request: _Request,
) -> tuple[list[torch.Tensor], float]:
    """Factors that keep as much or more of the tensor's squared norm, and the relative error.

    `total` is the squared norm, `kept` that of the core of the given factors. Each update is
    followed a little further than it goes, which halves the number of sweeps; a sweep that ends
    worse than the one before is not taken.
    """
    batch_dims = request.batch_dims
    best, error = factors, _error(kept, total)
    # A mode at full rank keeps all: it has nothing to refine.
    cut = [mode for mode, factor in factors.items() if factor.shape[-1] < factor.shape[-2]]
    for _ in range(request.sweeps if len(cut) > 1 else 0):
        current = dict(factors)
        for mode in cut:
            others = [current[other] for other in cut]
            projected = project(tensor, others, cut, skip=mode, batch_dims=batch_dims)
            gram = mode_gram(projected, mode, batch_dims)
            update = _towards_leading(gram, current[mode])
            if mode == cut[-1]:
                kept = (update * (gram @ update)).double().sum().item()
                candidate = {**current, mode: update}
            current[mode] = _beyond(current[mode], update)
        gained = error - _error(kept, total)
        if gained > 0:
            best, error = candidate, error - gained
        if gained < request.improvement:
            break
        factors = current
    return [best[mode] for mode in request.modes], error


def _error(kept: float, total: float) -> float:
    return math.sqrt(max(total - kept, 0.0) / total)


def _towards_leading(gram: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns nearer to the leading eigenvectors of a Gram matrix than `factor`'s.

    Of a short mode, these eigenvectors. Of a long one, a cubic Chebyshev polynomial of the matrix,
    small on the eigenvalues that are not wanted, applied to the factor (Zhou and Saad, SIMAX 29,
    2007): nearly as good for the sweeps, at a third of the price.
    """
    length, rank = factor.shape[-2:]
    if length <= _SHORT or 2 * rank > length:
        return leading_eigenvectors(gram)[1][..., :rank]
    image = gram @ factor
    eigenvalues = torch.linalg.eigvalsh(factor.mT @ image)[..., None]
    # What is rounding of the greatest is nothing to divide by: the tensor has a lesser rank.
    rounding = torch.finfo(gram.dtype).eps * eigenvalues[..., -1:, :]
    half = torch.maximum(eigenvalues[..., :1, :] / 2, rounding)
    half = torch.where(half > 0, half, 1)
    before, filtered = factor, image / half - factor
    for _ in range(2):
        before, filtered = filtered, 2 * (gram @ filtered / half - filtered) - before
    return torch.linalg.qr(filtered).Q


def _beyond(factor: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    """A little further on the way from one orthonormal factor to the other."""
    further = update + _MOMENTUM * (update - factor @ (factor.mT @ update))
    # Nearly orthonormal as they are, so that the Cholesky factor of their Gram matrix is exact.
    triangle = torch.linalg.cholesky(further.mT @ further)
    return torch.linalg.solve_triangular(triangle, further.mT, upper=False).mT


def _trim(
    tensor: torch.Tensor,
    core: torch.Tensor,
    factors: Sequence[torch.Tensor],
    request: _Request,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Cut the core's slices that the tolerance still allows, those that cost least per number."""
    batch_dims = request.batch_dims
    budget = Budget.of(tensor, request.tolerance, batch_dims)
    budget.pay(energies(tensor, batch_dims) - energies(core, batch_dims))
    found = dict(zip(request.modes, factors, strict=True))
    for mode in found:
        # Slices of an all-orthogonal core lose exactly their own norm.
        _, vectors = leading_eigenvectors(mode_gram(core, mode, batch_dims))
        core = mode_product(core, vectors.mT, mode, batch_dims)
        found[mode] = found[mode] @ vectors
    while cheapest := _cheapest_slice(core, found, budget, batch_dims):
        mode, lost = cheapest
        budget.pay(lost)
        axis = batch_dims + mode
        core = core.narrow(axis, 0, core.shape[axis] - 1)
        found[mode] = found[mode][..., :-1]
    return core, list(found.values())


def _cheapest_slice(
    core: torch.Tensor, factors: dict[int, torch.Tensor], budget: Budget, batch_dims: int
) -> tuple[int, torch.Tensor] | None:
    """The mode whose last slice loses least per number saved within the budget, and what it loses.

    None if the budget allows no slice.
    """
    assert budget.left is not None
    best, lowest = None, math.inf
    for mode, factor in factors.items():
        length = core.shape[batch_dims + mode]
        lost = energies(core.narrow(batch_dims + mode, length - 1, 1), batch_dims)
        price = lost.sum().item() / (core.numel() // length + factor.shape[-2])
        if length > 1 and (lost <= budget.left).all() and price < lowest:
            best, lowest = (mode, lost), price
    return best
