"""The tensor ring: a tensor train closed on itself.

Zhao, Zhou, Xie, Zhang, Cichocki: Tensor ring decomposition. arXiv:1606.05535 (2016): TR-SVD,
section 3.1; TR-ALS, section 3.2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch

from rankfold.decompose.budget import Budget
from rankfold.decompose.decomposition import (
    Decomposition,
    shape,
    to_unit_scale,
    working_precision,
)
from rankfold.decompose.tensor_train import split_truncated
from rankfold.decompose.triangular import solve_normal
from rankfold.decompose.unfolding import mode_product, split_point
from rankfold.decompose.weights import Weights, Whitening
from rankfold.errors import RankError

# Entries that a rank above what the start needs begins with, relative to the others.
_NOISE = 1e-2


@dataclass(frozen=True)
class TensorRing(Decomposition):
    """`tensor[i1, ..., id] ≈ trace(cores[0][:, i1] cores[1][:, i2] ... cores[d-1][:, id])`."""

    cores: tuple[torch.Tensor, ...]
    """Each (rank before, length of the mode, rank after); the last rank is the first."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """The d ranks, each the one before its core."""
        return tuple(core.shape[0] for core in self.cores)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(core.shape[1] for core in self.cores)

    @property
    def n_parameters(self) -> int:
        return sum(core.numel() for core in self.cores)

    def to_tensor(self) -> torch.Tensor:
        middle = split_point(self.shape)
        first, last = chain(self.cores[:middle]), chain(self.cores[middle:])
        product = first.permute(1, 2, 0).flatten(1) @ last.permute(0, 2, 1).flatten(0, 1)
        return product.reshape(self.shape)


def tensor_ring(
    tensor: torch.Tensor,
    ranks: int | Sequence[int] | None = None,
    tolerance: float | None = None,
    *,
    iterations: int = 100,
    improvement: float = 1e-5,
    starts: int = 1,
    weights: Weights | None = None,
    seed: int = 0,
) -> TensorRing:
    """Tensor-ring decomposition: TR-SVD, and for given ranks alternating least squares from there.

    `tensor` has two modes or more, float16 to float64; computed in float64. `ranks`, one for all or
    d of them (each the rank before its core), are refined by at most `iterations` sweeps until one
    lowers the relative error by less than `improvement`; of more than one of `starts`, the others
    random, the best end is taken. `tolerance` is the relative Frobenius
    error to keep, by TR-SVD alone, whose first rank is split so that the ring is smallest; with
    neither the ring is exact. `weights`, one for each mode that has one, define the norm of the
    error. The same seed gives the same result. Carries no gradient. Raises RankError for ranks
    below 1, or two neighbours whose product exceeds that of the other modes' lengths; ValueError
    for NaN, infinity, weights that do not fit, a tolerance outside [0, 1), or both ranks and
    tolerance.
    """
    if starts < 1:
        raise ValueError(f"starts must be at least 1, not {starts}")
    if tensor.dim() < 2 or tensor.numel() == 0:
        raise RankError(f"tensor_ring takes two modes or more, not a tensor {shape(tensor)}")
    if ranks is not None and tolerance is not None:
        raise ValueError("give at most one of ranks and tolerance")
    asked = None if ranks is None else _checked(ranks, tensor)
    work = working_precision(tensor.detach())
    whitening = Whitening.of(tensor.shape, weights)
    scaled, scale = to_unit_scale(whitening.whiten(work.double()))
    if asked is None:
        cores = _smallest_within(scaled, 0.0 if tolerance is None else tolerance)
    else:
        generator = torch.Generator().manual_seed(seed)
        cores = _best_of(scaled, asked, starts, iterations, improvement, generator)
    cores[-1] = scale * cores[-1]
    for mode, inverse_root in whitening.inverse_roots.items():
        cores[mode] = mode_product(cores[mode], inverse_root, 1)
    return TensorRing(tuple(core.to(work.dtype).contiguous() for core in cores))


def chain(cores: Sequence[torch.Tensor]) -> torch.Tensor:
    """Cores contracted in a row: (first rank, product of the lengths, last rank)."""
    product = cores[0]
    for core in cores[1:]:
        product = torch.tensordot(product, core, dims=1).flatten(1, 2)
    return product


def _checked(ranks: int | Sequence[int], tensor: torch.Tensor) -> list[int]:
    order = tensor.dim()
    asked = [ranks] * order if isinstance(ranks, int) else list(ranks)
    if len(asked) != order or not all(rank >= 1 for rank in asked):
        raise RankError(f"{order} ranks of at least 1 are needed, not {ranks}")
    for mode, length in enumerate(tensor.shape):
        unknown, others = asked[mode] * asked[(mode + 1) % order], tensor.numel() // length
        if unknown > others:
            raise RankError(
                f"ranks {asked[mode]} and {asked[(mode + 1) % order]} around mode {mode} multiply "
                f"to more than the {others} entries of the other modes of {shape(tensor)}"
            )
    return asked


def _smallest_within(tensor: torch.Tensor, tolerance: float) -> list[torch.Tensor]:
    """TR-SVD within the tolerance, for the split of the first rank with the fewest parameters."""
    matrix = tensor.reshape(tensor.shape[0], -1)
    budget = Budget.of(tensor, tolerance)
    # The first unfolding bears two ranks and gets two shares (Zhao et al., equation 18).
    left, rest = split_truncated(matrix, min(matrix.shape), budget, max(1, tensor.dim() / 2))
    rings = []
    for first in range(1, left.shape[1] + 1):
        if left.shape[1] % first == 0:
            spent = Budget(None if budget.left is None else budget.left.clone())
            rings.append(_tr_svd(tensor.shape, left, rest, first, None, spent))
    return min(rings, key=lambda cores: sum(core.numel() for core in cores))


def _best_of(
    tensor: torch.Tensor,
    ranks: Sequence[int],
    starts: int,
    iterations: int,
    improvement: float,
    generator: torch.Generator,
) -> list[torch.Tensor]:
    """The best of the refined TR-SVD and refined random rings."""
    rings = [_padded(_start(tensor, ranks), ranks, generator)]
    if not tensor.any():
        return rings[0]
    for _ in range(starts - 1):
        empty = [tensor.new_zeros(0, length, 0) for length in tensor.shape]
        rings.append(_padded(empty, ranks, generator))
    ends = [_alternate(tensor, cores, iterations, improvement) for cores in rings]
    if starts == 1:
        return ends[0]
    return min(ends, key=lambda cores: (TensorRing(tuple(cores)).to_tensor() - tensor).norm())


def _start(tensor: torch.Tensor, ranks: Sequence[int]) -> list[torch.Tensor]:
    """TR-SVD at these ranks, or lower ones where an unfolding has no more."""
    matrix = tensor.reshape(tensor.shape[0], -1)
    full = min(matrix.shape)
    first = min(ranks[0], full)
    second = min(ranks[1], full // first)
    left, rest = split_truncated(matrix, first * second, Budget(None))
    return _tr_svd(tensor.shape, left, rest, first, ranks, Budget(None))


def _tr_svd(
    lengths: Sequence[int],
    left: torch.Tensor,
    rest: torch.Tensor,
    first: int,
    ranks: Sequence[int] | None,
    budget: Budget,
) -> list[torch.Tensor]:
    """Cores from the split first unfolding, its rank divided into `first` and what remains."""
    before = left.shape[1] // first
    cores = [left.reshape(lengths[0], first, before).transpose(0, 1)]
    # The ring's first bond travels to the end: it belongs to the last core.
    rest = rest.reshape(first, before, -1).permute(1, 2, 0)
    for mode in range(1, len(lengths) - 1):
        unfolding = rest.reshape(before * lengths[mode], -1)
        limit = min(unfolding.shape) if ranks is None else min(ranks[mode + 1], *unfolding.shape)
        left, rest = split_truncated(unfolding, limit, budget, len(lengths) - 1 - mode)
        cores.append(left.reshape(before, lengths[mode], -1))
        before = left.shape[1]
    cores.append(rest.reshape(before, lengths[-1], first))
    return cores


def _padded(
    cores: Sequence[torch.Tensor], ranks: Sequence[int], generator: torch.Generator
) -> list[torch.Tensor]:
    """The cores within larger ones, whose other entries are small and random."""
    padded = []
    for mode, core in enumerate(cores):
        size = (ranks[mode], core.shape[1], ranks[(mode + 1) % len(ranks)])
        if tuple(core.shape) != size:
            noise = torch.randn(size, dtype=core.dtype, generator=generator).to(core.device)
            size_of_entries = core.square().mean().sqrt() if core.numel() else 1 / _NOISE
            larger = noise * (_NOISE * size_of_entries)
            larger[: core.shape[0], :, : core.shape[2]] = core
            core = larger
        padded.append(core)
    return padded


def _alternate(
    tensor: torch.Tensor, cores: list[torch.Tensor], iterations: int, improvement: float
) -> list[torch.Tensor]:
    """TR-ALS: solve for one core after the other until the relative error hardly falls.

    As in the ALS of CP the modes of each half share one product of the tensor with the other half,
    and the normal equations come from the cores alone.
    """
    total = tensor.square().sum().item()
    middle = split_point(tensor.shape)
    matrix = tensor.reshape(tensor.shape[:middle].numel(), -1)
    halves = (range(middle), range(middle, tensor.dim()))
    cores = [_unit(core) for core in cores]
    error, solved = math.inf, cores[-1]
    for _ in range(iterations):
        for group, others, view in ((*halves, matrix), (*halves[::-1], matrix.mT)):
            rest = chain([cores[mode] for mode in others])
            # (lengths of the group, rank before it, rank after it)
            shared = (view @ rest.permute(1, 2, 0).flatten(1)).unflatten(
                1, (rest.shape[2], rest.shape[0])
            )
            for mode in group:
                product = _product(shared, cores, group, mode)
                normal = _normal(cores, mode)
                rows = product.transpose(0, 1).flatten(1)
                solution = solve_normal(normal, rows)
                inner = (rows * solution).sum().item()
                square = (normal * (solution.mT @ solution)).sum().item()
                solved = solution.unflatten(1, (product.shape[0], -1)).transpose(0, 1)
                cores[mode] = _unit(solved)
        before, error = error, math.sqrt(max(total - 2 * inner + square, 0.0) / total)
        if before - error < improvement:
            break
    return [*cores[:-1], solved] if iterations else cores


def _unit(core: torch.Tensor) -> torch.Tensor:
    norm = torch.linalg.vector_norm(core)
    return core / norm if norm > 0 else core


def _product(
    shared: torch.Tensor, cores: Sequence[torch.Tensor], group: range, mode: int
) -> torch.Tensor:
    """The tensor times all cores but one: (rank before, length of the mode, rank after)."""
    ends = [torch.eye(size).to(shared)[:, None, :] for size in shared.shape[1:]]
    before = chain([ends[0], *(cores[n] for n in group if n < mode)])
    after = chain([*(cores[n] for n in group if n > mode), ends[1]])
    split = shared.reshape(before.shape[1], -1, after.shape[1], shared.shape[1], shared.shape[2])
    return torch.einsum("anbij,iap,qbj->pnq", split, before, after)


def _normal(cores: Sequence[torch.Tensor], mode: int) -> torch.Tensor:
    """Normal equations of one core, (rank before x rank after) squared, from the others."""
    order = len(cores)
    others = [cores[(mode + step) % order] for step in range(1, order)]
    transfers = (
        torch.einsum("anb,cnd->acbd", core, core).flatten(2).flatten(0, 1) for core in others
    )
    around = reduce(torch.matmul, transfers)
    before, after = cores[mode].shape[0], cores[mode].shape[2]
    split = around.reshape(after, after, before, before)
    return split.permute(2, 0, 3, 1).reshape(before * after, before * after)
