"""Singular value decomposition of matrices with one long side, block by block.

float64 by TSQR (Demmel, Grigori, Hoemmen, Langou: Communication-optimal parallel and sequential QR
and LU factorizations. SIAM Journal on Scientific Computing 34, 2012). float32 by its Gram matrix in
float64: its singular values down to 1e-8 of the greatest are those of the matrix, more than TSQR in
float32 can say, and it takes four fifths of the time. The singular vectors of the long side come
from a second pass over the blocks, those of an ill-conditioned float64 matrix with one more between
(Benson, Gleich, Demmel: Direct QR factorizations for tall-and-skinny matrices in MapReduce
architectures. IEEE Big Data 2013: indirect TSQR with iterative refinement).
"""

import mmap
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeGuard

import numpy as np
import torch

from rankfold.decompose.decomposition import shape, working_precision
from rankfold.decompose.matrix import SVD, check_rank, svd
from rankfold.decompose.weights import Weights, Whitening
from rankfold.errors import RankError

Block = torch.Tensor | np.ndarray
Blocks = Block | Iterable[Block]
_NUMBERS_PER_BLOCK = 2**22
# Rows and columns of a piece of a Gram matrix's product that stays in the processor's cache.
_ROWS_IN_CACHE = 4096
_COLUMNS_AT_ONCE = 64


def tall_skinny_svd(
    matrix: Blocks,
    rank: int | None = None,
    *,
    energy: float | None = None,
    tolerance: float | None = None,
    weights: Weights | None = None,
    block_rows: int | None = None,
    long_vectors: bool = True,
    u_file: str | Path | None = None,
) -> SVD:
    """SVD of a matrix whose long side need not fit in memory; its short side squared must.

    `matrix` is a tensor or an array, read in blocks of `block_rows` along its longer side: a
    `numpy.memmap` from its file, so that no more than a block is in memory. Or blocks of rows,
    float16 to float64 (half precision is computed in float32), each (any number, columns): a list,
    or anything else that can be gone through again; what cannot, an iterator, is kept as it comes.
    `rank`, `energy` and `tolerance` truncate as in `svd`. `weights` are those of `svd`; the long
    side takes none.

    Without `long_vectors` there is one pass over the blocks, nothing the length of the long side is
    kept, and `u` has no rows (for a wide matrix `vh` no columns). With `u_file` the singular
    vectors of the long side, and what an iterator yields meanwhile, are kept in files instead of
    memory: `u` (for a wide matrix `vh.mT`) is then mapped to this one, numbers in row order without
    a header. Those of singular values above machine epsilon times the greatest are orthonormal, to
    the root of machine epsilon at worst. Carries no gradient. Raises RankError for an impossible
    rank or shape, ValueError for NaN, infinity, blocks that do not fit each other, weights that do
    not fit, or more than one of rank, energy and tolerance.
    """
    if sum(asked is not None for asked in (rank, energy, tolerance)) > 1:
        raise ValueError("give at most one of rank, energy and tolerance")
    wide = False
    if isinstance(matrix, (torch.Tensor, np.ndarray)):
        if matrix.ndim != 2 or 0 in matrix.shape:
            size = "x".join(map(str, matrix.shape)) or "scalar"
            raise RankError(f"tall_skinny_svd takes a non-empty matrix, not one of shape {size}")
        wide = matrix.shape[0] < matrix.shape[1]
    long, short = (1, 0) if wide else (0, 1)
    if weights and long in weights:
        raise ValueError(f"the long side (mode {long}) takes no weight")
    with _Source.of(matrix, wide, block_rows, u_file) as source:
        square = _same_short_side(source, keep=long_vectors)
        whitening = Whitening.of(square.shape, {1: weights[short]} if weights else None)
        small = svd(whitening.whiten(square), energy=energy, tolerance=tolerance)
        if rank is not None:
            check_rank(rank, min(source.rows, source.columns))
            small = small.truncate(rank)
        # What has fewer rows than columns has no more singular values than rows.
        small = small.truncate(min(small.ranks[0], source.rows))
        if long_vectors:
            u = _long_vectors(source, whitening, small, u_file)
        else:
            u = torch.empty(0, small.ranks[0], dtype=source.dtype, device=source.device)
    v = whitening.restore(small.vh.mT, 1).to(source.dtype)
    values = small.singular_values.to(source.dtype)
    return SVD(v, values, u.mT) if wide else SVD(u, values, v.mT)


class _Source:
    """Row blocks of a tall matrix that can be gone through more than once."""

    def __init__(self, first: Iterable[Block], spool: BinaryIO | None, spooled: bool) -> None:
        self._first = first
        self._spool = spool
        self._spooled = spooled
        self._lengths: list[int] = []
        self._kept: list[torch.Tensor] = []
        self.rows = 0
        self.columns = 0
        self.dtype = torch.float32
        self.device = torch.device("cpu")

    @staticmethod
    def of(
        matrix: Blocks, wide: bool, block_rows: int | None, u_file: str | Path | None
    ) -> "_Source":
        if isinstance(matrix, (torch.Tensor, np.ndarray)):
            return _Source(_Slices(matrix, wide, block_rows), None, False)
        once = iter(matrix) is matrix
        spool = None
        if once and u_file is not None:
            # Closed with the source.
            spool = tempfile.TemporaryFile(dir=Path(u_file).absolute().parent)  # noqa: SIM115
        return _Source(matrix, spool, once)

    def __enter__(self) -> "_Source":
        return self

    def __exit__(self, *_: object) -> None:
        if self._spool is not None:
            self._spool.close()

    def first_pass(self, keep: bool) -> Iterator[torch.Tensor]:
        """The blocks, checked; those of an iterator are kept if there will be another pass."""
        for block in self._first:
            if len(block) == 0:
                continue
            tensor = working_precision(_as_tensor(block).detach())
            if tensor.dim() != 2 or tensor.shape[1] == 0:
                raise RankError(f"a block of shape {shape(tensor)} is no rows of a matrix")
            if self._lengths and (tensor.shape[1], tensor.dtype) != (self.columns, self.dtype):
                raise ValueError(
                    f"block {len(self._lengths)} has {tensor.shape[1]} columns of {tensor.dtype}, "
                    f"the ones before {self.columns} of {self.dtype}"
                )
            self.columns, self.dtype, self.device = tensor.shape[1], tensor.dtype, tensor.device
            self.rows += tensor.shape[0]
            self._lengths.append(tensor.shape[0])
            if keep and self._spool is not None:
                tensor.cpu().contiguous().numpy().tofile(self._spool)
            elif keep and self._spooled:
                self._kept.append(tensor)
            yield tensor
        if self.rows == 0:
            raise RankError("there are no rows to decompose")

    def again(self) -> Iterator[torch.Tensor]:
        """The blocks once more."""
        if self._spool is None:
            for block in self._kept or self._first:
                if len(block) > 0:
                    yield working_precision(_as_tensor(block).detach())
            return
        self._spool.seek(0)
        kind = torch.empty(0, dtype=self.dtype).numpy().dtype
        for length in self._lengths:
            numbers = np.fromfile(self._spool, kind, length * self.columns)
            yield torch.from_numpy(numbers).reshape(length, self.columns).to(self.device)


class _Slices:
    """A matrix as blocks along its long side."""

    def __init__(self, matrix: Block, wide: bool, block_rows: int | None) -> None:
        self.matrix = matrix
        self.wide = wide
        short, self.long = sorted(matrix.shape)
        self.block_rows = block_rows or max(4 * short, _NUMBERS_PER_BLOCK // short)

    def __iter__(self) -> Iterator[torch.Tensor]:
        for start in range(0, self.long, self.block_rows):
            end = min(start + self.block_rows, self.long)
            if self.wide:
                yield _as_tensor(self.matrix[:, start:end]).mT
            elif _is_whole_file(self.matrix):
                yield torch.from_numpy(_rows_of_file(self.matrix, start, end))
            else:
                yield _as_tensor(self.matrix[start:end])


def _rows_of_file(matrix: np.memmap, start: int, end: int) -> np.ndarray:
    """Rows read and not mapped: pages once touched would stay in memory."""
    assert matrix.filename is not None
    columns = matrix.shape[1]
    offset = matrix.offset + start * columns * matrix.itemsize
    count = (end - start) * columns
    return np.fromfile(matrix.filename, matrix.dtype, count, offset=offset).reshape(-1, columns)


def _is_whole_file(matrix: Block) -> TypeGuard[np.memmap]:
    return (
        isinstance(matrix, np.memmap)
        # A view of another map would not have its own offset.
        and isinstance(matrix.base, mmap.mmap)
        and matrix.flags.c_contiguous
        and matrix.mode != "c"  # changes of a copy-on-write map are not in the file
        and matrix.filename is not None
    )


def _as_tensor(block: Block) -> torch.Tensor:
    if isinstance(block, torch.Tensor):
        return block
    return torch.from_numpy(block if block.flags.writeable else np.array(block))


def _same_short_side(source: _Source, keep: bool) -> torch.Tensor:
    """A matrix (columns, columns), float64, with the singular values and right vectors of all rows.

    R of a QR decomposition that goes through the blocks; for float32 a root of the Gram matrix.
    """
    product = None
    triangle = None
    for block in source.first_pass(keep):
        if block.dtype == torch.float64:
            triangle = _next_triangle(triangle, block)
            continue
        if product is None:
            product = block.new_zeros(source.columns, source.columns, dtype=torch.float64)
        _add_gram(product, block)
    if product is None:
        assert triangle is not None
        missing = triangle.shape[1] - triangle.shape[0]
        return torch.nn.functional.pad(triangle, (0, 0, 0, missing))
    eigenvalues, vectors = torch.linalg.eigh(product, UPLO="U")
    return eigenvalues.clamp_min(0).sqrt()[:, None] * vectors.mT


def _next_triangle(triangle: torch.Tensor | None, block: torch.Tensor) -> torch.Tensor:
    rows = block if triangle is None else torch.cat([triangle, block])
    return torch.linalg.qr(rows, mode="r").R


def _add_gram(product: torch.Tensor, block: torch.Tensor) -> None:
    """Add block.T @ block to the upper triangle of blocks, in float64."""
    for rows in block.split(_ROWS_IN_CACHE):
        double = rows.double()
        for start in range(0, len(product), _COLUMNS_AT_ONCE):
            end = start + _COLUMNS_AT_ONCE
            product[start:end, start:].addmm_(double[:, start:end].mT, double[:, start:])


def _long_vectors(
    source: _Source, whitening: Whitening, small: SVD, u_file: str | Path | None
) -> torch.Tensor:
    """The singular vectors of the long side, (rows, rank): a product with each block."""
    values = small.singular_values
    turn = whitening.whiten(small.vh).mT * torch.where(values > 0, 1 / values, 0)
    epsilon = torch.finfo(source.dtype).eps
    # The product's columns of small singular values are sums of large numbers that cancel.
    cancels = bool(values[-1] < epsilon**0.5 * values[0])
    if not cancels and turn.to(source.dtype).isfinite().all():  # not so of denormal numbers
        turn = turn.to(source.dtype)
    blocks = ((block.to(turn.dtype) @ turn).to(block.dtype) for block in source.again())
    if cancels and source.dtype == torch.float64:
        # After the product, not before: it is the product's rounding that is corrected.
        correction = _correction(source, turn, values > epsilon * values[0])
        blocks = (block @ correction for block in blocks)
    if u_file is None:
        return torch.cat(list(blocks))
    with Path(u_file).open("wb") as file:
        for block in blocks:
            block.cpu().numpy().tofile(file)
    size = (source.rows, turn.shape[1])
    mapped = torch.from_file(str(u_file), shared=True, size=size[0] * size[1], dtype=source.dtype)
    return mapped.reshape(size)


def _correction(source: _Source, turn: torch.Tensor, good: torch.Tensor) -> torch.Tensor:
    """What makes the singular vectors that a map of rows gives orthonormal.

    The inverse of R of their QR decomposition, in the columns that are more than rounding.
    """
    triangle = None
    for block in source.again():
        triangle = _next_triangle(triangle, block @ turn)
    assert triangle is not None
    signed = triangle * triangle.diagonal().sign()[:, None]
    identity = torch.eye(len(good), dtype=turn.dtype, device=turn.device)
    return torch.linalg.inv(torch.where(good & good[:, None], signed, identity))
