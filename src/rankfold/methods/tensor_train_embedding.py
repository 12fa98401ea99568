"""Embeddings as tensor trains: the TT-SVD of a table whose rows and columns are split into modes.

Khrulkov, Hrinchuk, Mirvakhabova, Oseledets: Tensorized embedding layers. EMNLP Findings 2020.
There they are trained from scratch (`rankfold.layers.TensorTrainEmbedding`). The tokens of a
trained table are in no order that its tensor would be of low rank in.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from rankfold.decompose import tensor_train
from rankfold.decompose.decomposition import working_precision
from rankfold.layers import TensorTrainEmbedding, assign_factors, check_ranks
from rankfold.methods.method import Rank, Spectrum, aligned_ranks, check_alignment, other_kind
from rankfold.methods.moments import Moments
from rankfold.methods.svd import why_not_lookup

_TRIED = 6  # ranks whose losses are measured


@dataclass(frozen=True)
class EmbeddingTrain:
    """E (n, d) as a train of cores (r, n_k, d_k, r'), one rank bounding all bonds.

    Takes embeddings. The train is found in the weight metric, its loss measured in the one that is
    given.
    """

    name: ClassVar[str] = "tensor-train-embedding"
    knows_diagonals: ClassVar[bool] = True
    alignment: int = 8
    modes: int = 3

    def __post_init__(self) -> None:
        check_alignment(self.alignment)
        if type(self.modes) is not int or self.modes < 2:
            raise ValueError(f"modes is an integer of at least 2, not {self.modes!r:.40}")

    def why_not(self, layer: nn.Module) -> str | None:
        if type(layer) is not nn.Embedding:
            return other_kind(layer)
        return why_not_lookup(layer)

    def fit(self, layer: nn.Embedding, moments: Moments) -> "EmbeddingTrains":
        working_precision(layer.weight.detach())  # refuses NaN
        return EmbeddingTrains(self, layer, moments)

    def skeleton(self, layer: nn.Embedding, rank: Rank) -> TensorTrainEmbedding:
        form = TensorTrainEmbedding(
            layer.num_embeddings,
            layer.embedding_dim,
            1,
            self.modes,
            self.modes,
            layer.padding_idx,
            device="meta",
        )
        check_ranks(rank, (max(form.limits),), layer)
        return TensorTrainEmbedding(
            layer.num_embeddings,
            layer.embedding_dim,
            rank[0],
            form.row_modes,
            form.column_modes,
            layer.padding_idx,
            "meta",
            layer.weight.dtype,
        )


@dataclass(frozen=True)
class EmbeddingTrains:
    """The trains of one table: each rank's is found when it is asked for."""

    method: EmbeddingTrain
    layer: nn.Embedding
    moments: Moments

    @property
    def spectra(self) -> Sequence[Spectrum]:
        return ()

    def ranks(self) -> Sequence[Rank]:
        most = max(self.method.skeleton(self.layer, (1,)).limits)
        return [(rank,) for rank in aligned_ranks(most, self.method.alignment)]

    def build(self, rank: Rank) -> TensorTrainEmbedding:
        form = self.method.skeleton(self.layer, rank)
        rows, columns = form.row_modes, form.column_modes
        table = self.layer.weight.detach()
        padded = functional.pad(table, (0, 0, 0, int(np.prod(rows)) - len(table)))
        count = len(rows)
        order = [place for k in range(count) for place in (k, count + k)]
        tensor = padded.reshape(*rows, *columns).permute(order)
        pairs = [n * d for n, d in zip(rows, columns, strict=True)]
        train = tensor_train(tensor.reshape(pairs), [core.shape[3] for core in form.cores[:-1]])
        assign_factors(
            form,
            [_widened(*both) for both in zip(train.cores, form.cores, strict=True)],
            self.layer,
        )
        return form

    def loss(self, rank: Rank) -> float:
        """Measured at a few ranks, interpolated between them; never growing."""
        ranks = [entry for (entry,) in self.ranks()]
        check_ranks(rank, (ranks[-1],), self.layer)
        return float(np.interp(rank[0], *self._losses))

    @cached_property
    def _losses(self) -> tuple[list[int], list[float]]:
        ranks = [entry for (entry,) in self.ranks()]
        wanted = np.geomspace(ranks[0], ranks[-1], _TRIED)
        tried = sorted({min(ranks, key=lambda rank: abs(rank - one)) for one in wanted})
        losses = [self._measure((rank,)) for rank in tried]
        return tried, np.minimum.accumulate(losses).tolist()

    def _measure(self, rank: Rank) -> float:
        weight = self.layer.weight.detach().double().mT
        difference = self.build(rank).to_weight().detach().double().mT - weight
        return self.moments.loss_of(self.moments.squared_error(difference), weight).item()


def _widened(core: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A core (rank, n d, rank) as (rank, n, d, rank), zeros where a rank was not needed."""
    before, rows, columns, after = like.shape
    short = before - core.shape[0], after - core.shape[2]
    return functional.pad(core, (0, short[1], 0, 0, 0, short[0])).reshape(
        before, rows, columns, after
    )
