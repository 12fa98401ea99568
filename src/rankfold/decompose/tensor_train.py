"""The tensor train, of tensors and of matrices.

Oseledets: Tensor-train decomposition. SIAM Journal on Scientific Computing 33 (2011). TT-matrix:
Oseledets: Approximation of 2^d x 2^d matrices using tensor decomposition. SIMAX 31 (2010).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rankfold.decompose.matrix import SVD, relative_error, shape, svd, working_precision
from rankfold.errors import RankError
from rankfold.ranks import tolerance_rank


@dataclass(frozen=True)
class TensorTrain:
    """tensor[i1, ..., id] ≈ cores[0][:, i1] cores[1][:, i2] ... cores[d-1][:, id]."""

    cores: tuple[torch.Tensor, ...]  # each (rank before, length of the mode, rank after)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The d - 1 ranks between the cores."""
        return tuple(core.shape[2] for core in self.cores[:-1])

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(core.shape[1] for core in self.cores)

    @property
    def n_parameters(self) -> int:
        return sum(core.numel() for core in self.cores)

    def to_tensor(self) -> torch.Tensor:
        tensor = self.cores[0]
        for core in self.cores[1:]:
            tensor = torch.tensordot(tensor, core, dims=1)
        return tensor.reshape(self.shape)

    def relative_error(self, tensor: torch.Tensor) -> float:
        """Frobenius norm of the difference, relative to that of `tensor` (0 for a zero tensor)."""
        return relative_error(self.to_tensor(), tensor)

    def norm(self) -> float:
        """The Frobenius norm of the tensor, from the cores alone."""
        return torch.linalg.vector_norm(self.right_orthogonal().cores[0].double()).item()

    def right_orthogonal(self) -> "TensorTrain":
        """The same tensor, every core but the first with orthonormal rows (rank, length x rank)."""
        cores = list(self.cores)
        for k in range(len(cores) - 1, 0, -1):
            q, r = torch.linalg.qr(cores[k].flatten(1).mT)
            cores[k] = q.mT.reshape(-1, *cores[k].shape[1:])
            cores[k - 1] = torch.tensordot(cores[k - 1], r.mT, dims=1)
        return TensorTrain(tuple(cores))

    def round(
        self, ranks: int | Sequence[int] | None = None, tolerance: float | None = None
    ) -> "TensorTrain":
        """The same tensor at lower ranks, or within a tolerance, without ever forming it.

        Arguments and errors are those of `tensor_train`; the tolerance is relative to this tensor.
        """
        limits = _limits(self.shape, ranks, tolerance)
        cores = list(self.right_orthogonal().cores)
        budget = _Budget(torch.linalg.vector_norm(cores[0].double()).item(), tolerance)
        for k, limit in enumerate(limits):
            found = _truncated(cores[k].flatten(0, 1), limit, budget, len(limits) - k)
            cores[k] = found.u.reshape(*cores[k].shape[:2], -1)
            carried = found.singular_values[:, None] * found.vh
            cores[k + 1] = torch.tensordot(carried, cores[k + 1], dims=1)
        return TensorTrain(tuple(cores))


@dataclass(frozen=True)
class TensorTrainMatrix:
    """A matrix whose rows and columns are split into modes, as a train of paired modes."""

    train: TensorTrain  # of the tensor (row mode x column mode) per pair
    row_modes: tuple[int, ...]
    column_modes: tuple[int, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        return self.train.ranks

    @property
    def n_parameters(self) -> int:
        return self.train.n_parameters

    @property
    def cores(self) -> tuple[torch.Tensor, ...]:
        """Each (rank before, row mode, column mode, rank after)."""
        return tuple(
            core.reshape(core.shape[0], rows, columns, core.shape[2])
            for core, rows, columns in zip(
                self.train.cores, self.row_modes, self.column_modes, strict=True
            )
        )

    def to_tensor(self) -> torch.Tensor:
        """The matrix, (product of row modes, product of column modes)."""
        pairs = [n for pair in zip(self.row_modes, self.column_modes, strict=True) for n in pair]
        tensor = self.train.to_tensor().reshape(pairs)
        order = [*range(0, len(pairs), 2), *range(1, len(pairs), 2)]
        return tensor.permute(order).reshape(math.prod(self.row_modes), -1)

    def relative_error(self, matrix: torch.Tensor) -> float:
        """Frobenius norm of the difference, relative to that of `matrix` (0 for a zero matrix)."""
        return relative_error(self.to_tensor(), matrix)


def tensor_train(
    tensor: torch.Tensor,
    ranks: int | Sequence[int] | None = None,
    tolerance: float | None = None,
) -> TensorTrain:
    """Tensor-train decomposition by a sweep of truncated SVDs (TT-SVD).

    `tensor` has two modes or more, float16 to float64 (half precision is computed in float32).
    `ranks` are at most these, one for all or d - 1 of them (larger ones are clipped to what each
    unfolding has); `tolerance` is the relative Frobenius error of the whole, shared out over the
    unfoldings, what one does not use going to the next; with neither the decomposition is exact.
    Within a factor √(d - 1) of the best of its ranks. Raises RankError for impossible ranks,
    ValueError for NaN, infinity, a tolerance outside [0, 1), or both ranks and tolerance.
    """
    if tensor.dim() < 2 or tensor.numel() == 0:
        raise RankError(f"tensor_train takes two modes or more, not a tensor {shape(tensor)}")
    limits = _limits(tensor.shape, ranks, tolerance)
    work = working_precision(tensor)
    budget = _Budget(torch.linalg.vector_norm(work.double()).item(), tolerance)
    cores = []
    before = 1
    for k, limit in enumerate(limits):
        unfolding = work.reshape(before * tensor.shape[k], -1)
        found = _truncated(unfolding, limit, budget, len(limits) - k)
        cores.append(found.u.reshape(before, tensor.shape[k], -1))
        work = found.singular_values[:, None] * found.vh
        before = found.ranks[0]
    cores.append(work.reshape(before, tensor.shape[-1], 1))
    return TensorTrain(tuple(core.contiguous() for core in cores))


def tensor_train_matrix(
    matrix: torch.Tensor,
    row_modes: Sequence[int],
    column_modes: Sequence[int],
    ranks: int | Sequence[int] | None = None,
    tolerance: float | None = None,
) -> TensorTrainMatrix:
    """The tensor train of a matrix, mode k pairing `row_modes[k]` with `column_modes[k]`.

    Ranks, tolerance and errors as in `tensor_train`. Raises RankError if the modes, equally many
    and two or more, do not multiply to the sides of the matrix.
    """
    sides = (math.prod(row_modes), math.prod(column_modes))
    if matrix.shape != sides or len(row_modes) != len(column_modes) or len(row_modes) < 2:
        raise RankError(
            f"modes {tuple(row_modes)} and {tuple(column_modes)} do not fit {shape(matrix)}"
        )
    count = len(row_modes)
    order = [axis for k in range(count) for axis in (k, count + k)]
    paired = matrix.reshape(*row_modes, *column_modes).permute(order)
    lengths = [r * c for r, c in zip(row_modes, column_modes, strict=True)]
    train = tensor_train(paired.reshape(lengths), ranks, tolerance)
    return TensorTrainMatrix(train, tuple(row_modes), tuple(column_modes))


class _Budget:
    """The squared error that is left to spend; None if ranks and not a tolerance decide."""

    def __init__(self, norm: float, tolerance: float | None) -> None:
        self.left = None if tolerance is None else (tolerance * norm) ** 2


def _truncated(unfolding: torch.Tensor, limit: int, budget: _Budget, steps_left: int) -> SVD:
    """The SVD of an unfolding at `limit`, or at the least rank within its share of the budget."""
    found = svd(unfolding)
    if budget.left is None:
        return found.truncate(min(limit, found.ranks[0]))
    energy = found.singular_values.double().square()
    total = energy.sum().item()
    share = min(budget.left / steps_left / total, 1 - 1e-12) if total else 0.0
    rank = tolerance_rank(found.singular_values, math.sqrt(share))
    budget.left -= energy[rank:].sum().item()
    return found.truncate(rank)


def _limits(
    lengths: Sequence[int], ranks: int | Sequence[int] | None, tolerance: float | None
) -> list[int]:
    """The greatest rank of each of the d - 1 unfoldings."""
    if ranks is not None and tolerance is not None:
        raise ValueError("give at most one of ranks and tolerance")
    if tolerance is not None and not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must lie in [0, 1), not {tolerance}")
    count = len(lengths) - 1
    full = [min(math.prod(lengths[: k + 1]), math.prod(lengths[k + 1 :])) for k in range(count)]
    if ranks is None:
        return full
    asked = [ranks] * count if isinstance(ranks, int) else list(ranks)
    if len(asked) != count or not all(rank >= 1 for rank in asked):
        raise RankError(f"{count} ranks of at least 1 are needed, not {ranks}")
    return [min(pair) for pair in zip(asked, full, strict=True)]
