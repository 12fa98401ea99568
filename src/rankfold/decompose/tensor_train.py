"""The tensor train, of tensors and of matrices.

Oseledets: Tensor-train decomposition. SIAM Journal on Scientific Computing 33 (2011). TT-matrix:
Oseledets: Approximation of 2^d x 2^d matrices using tensor decomposition. SIMAX 31 (2010).
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
from rankfold.decompose.unfolding import gram, mode_product
from rankfold.decompose.weights import Weights, Whitening
from rankfold.errors import RankError

# Shorter side of a matrix from which on it is worth a try to find its rank from a sketch, and the
# longer side over the shorter up to which the eigenvectors are what takes the time.
_LARGE = 512
_NOT_LONG = 16
_SKETCH = 64  # columns of the first sketch


@dataclass(frozen=True)
class TensorTrain(Decomposition):
    """`tensor[i1, ..., id] ≈ cores[0][:, i1] cores[1][:, i2] ... cores[d-1][:, id]`."""

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
        cores[0], scale = to_unit_scale(cores[0])
        budget = Budget.of(cores[0], tolerance)
        for k, limit in enumerate(limits):
            left, carried = split_truncated(cores[k].flatten(0, 1), limit, budget, len(limits) - k)
            cores[k] = left.reshape(*cores[k].shape[:2], -1)
            cores[k + 1] = torch.tensordot(carried, cores[k + 1], dims=1)
        return TensorTrain((*cores[:-1], scale * cores[-1]))


@dataclass(frozen=True)
class TensorTrainMatrix(Decomposition):
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


def tensor_train(
    tensor: torch.Tensor,
    ranks: int | Sequence[int] | None = None,
    tolerance: float | None = None,
    *,
    weights: Weights | None = None,
) -> TensorTrain:
    """Tensor-train decomposition by a sweep of truncated SVDs (TT-SVD).

    `tensor` has two modes or more, float16 to float64 (half precision is computed in float32).
    `ranks` are at most these, one for all or d - 1 of them (larger ones are clipped to what each
    unfolding has); `tolerance` is the relative Frobenius error of the whole, shared out over the
    unfoldings, what one does not use going to the next; with neither the decomposition is exact.
    Within a factor √(d - 1) of the best of its ranks. `weights`, one for each mode that has one,
    define the norm of the error. All cores but the last have orthonormal columns (rank before x
    length, rank after); with a weight, in its metric. Carries no gradient. Raises RankError for
    impossible ranks, ValueError for NaN, infinity, weights that do not fit, a tolerance outside
    [0, 1), or both ranks and tolerance.
    """
    if tensor.dim() < 2 or tensor.numel() == 0:
        raise RankError(f"tensor_train takes two modes or more, not a tensor {shape(tensor)}")
    limits = _limits(tensor.shape, ranks, tolerance)
    work = working_precision(tensor.detach())
    whitening = Whitening.of(tensor.shape, weights)
    rest, scale = to_unit_scale(whitening.whiten(work))
    budget = Budget.of(rest, tolerance)
    cores = []
    before = 1
    for k, limit in enumerate(limits):
        unfolding = rest.reshape(before * tensor.shape[k], -1)
        left, rest = split_truncated(unfolding, limit, budget, len(limits) - k)
        cores.append(left.reshape(before, tensor.shape[k], -1))
        before = left.shape[1]
    cores.append(scale * rest.reshape(before, tensor.shape[-1], 1))
    for mode, inverse_root in whitening.inverse_roots.items():
        cores[mode] = mode_product(cores[mode].double(), inverse_root, 1)
    return TensorTrain(tuple(core.to(work.dtype).contiguous() for core in cores))


def tensor_train_matrix(
    matrix: torch.Tensor,
    row_modes: Sequence[int],
    column_modes: Sequence[int],
    ranks: int | Sequence[int] | None = None,
    tolerance: float | None = None,
    *,
    row_weights: Weights | None = None,
    column_weights: Weights | None = None,
) -> TensorTrainMatrix:
    """The tensor train of a matrix, mode k pairing `row_modes[k]` with `column_modes[k]`.

    Ranks, tolerance and errors as in `tensor_train`. The weights are those of the single modes, by
    their position in `row_modes` and `column_modes`: a weight of all rows or columns counts as far
    as it is a Kronecker product. Raises RankError if the modes, equally many and two or more, do
    not multiply to the sides of the matrix.
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
    weights = _pair_weights(row_modes, column_modes, row_weights or {}, column_weights or {})
    train = tensor_train(paired.reshape(lengths), ranks, tolerance, weights=weights)
    return TensorTrainMatrix(train, tuple(row_modes), tuple(column_modes))


def _pair_weights(
    row_modes: Sequence[int], column_modes: Sequence[int], rows: Weights, columns: Weights
) -> dict[int, torch.Tensor]:
    """Weights of the paired modes: Kronecker products of the row mode's and the column mode's."""
    Whitening.of(row_modes, rows)  # refuses what does not fit, by the mode it was given for
    Whitening.of(column_modes, columns)
    weights = {}
    for k in sorted(rows.keys() | columns.keys()):
        given = rows.get(k, columns.get(k))
        assert given is not None
        of_row = rows.get(k, torch.eye(row_modes[k], device=given.device)).double()
        of_column = columns.get(k, torch.eye(column_modes[k], device=given.device)).double()
        weights[k] = torch.kron(of_row, of_column)
    return weights


def split_truncated(
    matrix: torch.Tensor, limit: int, budget: Budget, truncations_left: float = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal columns and the rest, left @ rest ≈ matrix, as in a truncated SVD.

    At the rank `limit`, or the least within the budget's share. From the Gram matrix of the shorter
    side in float64, where its digits are enough: it costs a fraction of the SVD. Of a large matrix
    that a tolerance lets shrink to a small rank, from a random sketch: it costs a few products.
    """
    short, long = sorted(matrix.shape)
    if short >= _LARGE and long <= _NOT_LONG * short and budget.is_coarse(matrix):
        sketched = _by_sketch(matrix, budget, truncations_left)
        if sketched is not None:
            return sketched
    wide = matrix.shape[0] <= matrix.shape[1]
    if not wide or (matrix.dtype == torch.float64 and not budget.is_coarse(matrix)):
        u, singular_values, vh = torch.linalg.svd(matrix, full_matrices=False)
        rank = budget.truncate(singular_values.square(), limit, truncations_left)
        return u[:, :rank], singular_values[:rank, None] * vh[:rank]
    eigenvalues, vectors = leading_eigenvectors(gram(matrix.double()))
    rank = budget.truncate(eigenvalues, limit, truncations_left)
    left = vectors[:, :rank].to(matrix.dtype)
    return left, left.mT @ matrix


def _by_sketch(
    matrix: torch.Tensor, budget: Budget, truncations_left: float
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Left and rest from the leading subspace that random products find (Halko et al. 2011).

    None where the tolerance needs a rank above a quarter of full.
    """
    assert budget.left is not None
    allowed = budget.left / truncations_left
    generator = torch.Generator().manual_seed(0)
    width = _SKETCH
    while 4 * width <= min(matrix.shape):
        drawn = torch.randn(matrix.shape[1], width, generator=generator, dtype=matrix.dtype)
        basis = torch.linalg.qr(matrix @ drawn.to(matrix.device)).Q
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis).Q).Q
        inside = basis.mT @ matrix
        lost = energies(matrix - basis @ inside)
        if (2 * lost <= allowed).all():
            # What lies outside is spent; the truncation inside has what remains of the share.
            budget.pay(lost)
            share = float(budget.left / (allowed - lost))
            left, rest = split_truncated(inside, width, budget, share)
            return basis @ left, rest
        width *= 2
    return None


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
