"""An embedding whose table is a tensor train, looked up core by core."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from rankfold.errors import RankError
from rankfold.layers.form import factors_of, fill_dense
from rankfold.layers.modes import modes_of
from rankfold.layers.structured_linear import Factor
from rankfold.layers.tensor_train_linear import train_limits_of


class TensorTrainEmbedding(nn.ModuleList):
    """E[i, j] = G_1[i_1, j_1] G_2[i_2, j_2] ... G_k[i_k, j_k], a product of matrices.

    Khrulkov, Hrinchuk, Mirvakhabova, Oseledets: Tensorized embedding layers. EMNLP Findings 2020.
    i_1 ... i_k are the digits of token i in the row modes, whose product may be greater than the
    number of tokens: the rows beyond are never looked up. The cores are (rank before, row mode,
    column mode, rank after). Called as an `nn.Embedding`; the row of `padding_idx` is zero.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        row_modes: int | Sequence[int] = 3,
        column_modes: int | Sequence[int] = 3,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """With initial values for training from scratch: entries of E have variance 1.

        `rank` bounds all bonds, each of which is no greater than what makes it exact. Modes are
        given, or so many balanced ones. Raises RankError for a rank outside 1..the greatest of
        `limits`, or modes that do not make the table; IndexError for a padding index outside it.
        """
        super().__init__()
        rows, columns = table_modes(num_embeddings, embedding_dim, row_modes, column_modes)
        self.limits = train_limits_of([n * d for n, d in zip(rows, columns, strict=True)])
        if not 1 <= rank <= max(self.limits, default=1):
            raise RankError(f"rank {rank} is outside 1..{max(self.limits, default=1)}")
        if padding_idx is not None and not 0 <= padding_idx < num_embeddings:
            raise IndexError(f"padding_idx {padding_idx} is none of {num_embeddings} tokens")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.row_modes, self.column_modes, self.padding_idx = rows, columns, padding_idx
        ranks = [1, *(min(rank, limit) for limit in self.limits), 1]
        self.extend(
            Factor((ranks[k], rows[k], columns[k], ranks[k + 1]), device=device, dtype=dtype)
            for k in range(len(rows))
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal cores, of whose products the table's entries are sums of variance 1."""
        paths = math.prod(core.shape[0] for core in self.cores)
        for core in self.cores:
            nn.init.normal_(core, std=paths ** (-0.5 / len(self.row_modes)))

    @property
    def cores(self) -> list[torch.Tensor]:
        return [factor.weight for factor in factors_of(self)]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Vectors (..., embedding_dim) of token ids (...)."""
        left = ids.reshape(-1)
        digits = []
        for mode in reversed(self.row_modes):
            digits.append(left % mode)
            left = left // mode
        first, *others = zip(self.cores, reversed(digits), strict=True)
        vectors = first[0][0].index_select(0, first[1])  # (tokens, columns so far, rank)
        for core, digit in others:
            before, _, width, after = core.shape
            slices = core.index_select(1, digit).transpose(0, 1).reshape(-1, before, width * after)
            vectors = (vectors @ slices).reshape(len(vectors), -1, after)
        found = vectors.reshape(*ids.shape, self.embedding_dim)
        if self.padding_idx is None:
            return found
        return found.masked_fill((ids == self.padding_idx)[..., None], 0)

    def to_weight(self) -> torch.Tensor:
        """The table, (num_embeddings, embedding_dim), differentiable."""
        table = self.cores[0][0]  # (rows so far, columns so far, rank)
        for core in self.cores[1:]:
            rows, columns, _ = table.shape
            table = torch.einsum("ncr,rmds->nmcds", table, core).reshape(
                rows * core.shape[1], columns * core.shape[2], core.shape[3]
            )
        table = table[: self.num_embeddings, :, 0]
        if self.padding_idx is None:
            return table
        places = torch.arange(len(table), device=table.device)
        return table.masked_fill((places == self.padding_idx)[:, None], 0)

    def to_dense(self) -> nn.Embedding:
        """The `nn.Embedding` that this represents."""
        dense = nn.Embedding(
            self.num_embeddings,
            self.embedding_dim,
            self.padding_idx,
            device="meta",
            dtype=self.cores[0].dtype,
        )
        fill_dense(dense, self.to_weight(), self)
        return dense

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, padding_idx={self.padding_idx}"


def table_modes(
    count: int, width: int, row_modes: int | Sequence[int], column_modes: int | Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Modes of the rows, whose product is at least `count`, and of the columns, as many.

    Raises RankError where they do not make a table of this size.
    """
    columns = modes_of(width, column_modes)
    if isinstance(row_modes, int):
        rows = _covering_modes(count, row_modes)
    else:
        rows = tuple(row_modes)
        if math.prod(rows) < count or min(rows) < 1:
            raise RankError(f"modes {rows} do not number {count} tokens")
    if len(rows) != len(columns):
        raise RankError(f"{len(rows)} modes of rows and {len(columns)} of columns are no pairs")
    return rows, columns


def _covering_modes(count: int, modes: int) -> tuple[int, ...]:
    """So many modes of about one size, descending, whose product is barely `count` or more."""
    if modes < 1:
        raise RankError(f"{modes} modes: at least 1 is needed")
    found: list[int] = []
    left = count
    for remaining in range(modes, 0, -1):
        mode = next(n for n in range(1, left + 1) if n**remaining >= left)
        found.append(mode)
        left = -(-left // mode)
    return tuple(sorted(found, reverse=True))
