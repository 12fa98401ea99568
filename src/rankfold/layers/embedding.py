"""Embeddings as two factors, and weights that embeddings and linear layers share."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn

from rankfold.layers.form import assign_factors, check_ranks, fill_dense
from rankfold.layers.transposed_linear import TransposedLinear


class TwoFactorEmbedding(nn.Sequential):
    """`Embedding(n, rank)` then `Linear(rank, d, bias=False)`: E ≈ first.weight last.weightᵀ."""

    def __init__(
        self, layer: nn.Embedding, rank: int, device: torch.device | str | None = None
    ) -> None:
        """The shape, padding index and dtype of `layer`, with torch's initial values.

        On `device`, or that of `layer`. Raises RankError for a rank outside 1..min(n, d).
        """
        check_ranks((rank,), (min(layer.weight.shape),), layer)
        device, dtype = device or layer.weight.device, layer.weight.dtype
        count, width = layer.weight.shape
        super().__init__(
            nn.Embedding(count, rank, layer.padding_idx, device=device, dtype=dtype),
            nn.Linear(rank, width, bias=False, device=device, dtype=dtype),
        )
        self.num_embeddings, self.embedding_dim = count, width
        self.padding_idx = layer.padding_idx

    def to_dense(self) -> nn.Embedding:
        """The `nn.Embedding` that this represents."""
        first, last = cast(nn.Embedding, self[0]), cast(nn.Linear, self[1])
        dense = nn.Embedding(
            self.num_embeddings,
            self.embedding_dim,
            self.padding_idx,
            device="meta",
            dtype=first.weight.dtype,
        )
        fill_dense(dense, first.weight @ last.weight.mT, self)
        return dense


class TiedLayers(nn.ModuleList):
    """Embeddings and linear layers of one network that share one weight E (n, d), as one layer.

    Given token ids it looks them up, given features (..., d) it multiplies them by Eᵀ: what its
    users do with it, so that its costs are theirs.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__(layers)
        self.num_embeddings, self.embedding_dim = self.weight.shape

    @property
    def weight(self) -> nn.Parameter:
        """The shared one."""
        return cast(Any, self[0]).weight

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        wanted = nn.Linear if tensor.is_floating_point() else nn.Embedding
        return next(layer for layer in self if isinstance(layer, wanted))(tensor)


class TiedTwoFactor(nn.ModuleList):
    """Those of `TiedLayers` as two factors each, U (n, rank) and V (rank, d), shared by all.

    An embedding looks up a row of U and multiplies it by V, a linear layer multiplies by Vᵀ, then
    by Uᵀ and adds its bias. In the order of the dense layers; each is put in the place of its own.
    """

    def __init__(
        self, layers: TiedLayers, rank: int, device: torch.device | str | None = None
    ) -> None:
        """On `device`, or that of `layers`. Raises RankError for a rank outside 1..min(n, d)."""
        check_ranks((rank,), (min(layers.weight.shape),), layers)
        device, dtype = device or layers.weight.device, layers.weight.dtype
        count, width = layers.weight.shape
        placeholder = nn.Parameter(torch.empty(width, rank, device=device, dtype=dtype))
        forms: list[nn.Module] = []
        for layer in layers:
            if isinstance(layer, nn.Embedding):
                forms.append(TwoFactorEmbedding(layer, rank, device))
            else:
                bias = cast(nn.Linear, layer).bias is not None
                last = nn.Linear(rank, count, bias, device, dtype)
                forms.append(TiedTwoFactorLinear(TransposedLinear(placeholder), last))
        super().__init__(forms)
        self.num_embeddings, self.embedding_dim = count, width
        self.tie()

    def tie(self) -> None:
        """Give all the factors of the first."""
        first = cast(Any, self[0])
        table, other = (
            (first[0], first[1]) if isinstance(first, TwoFactorEmbedding) else (first[1], first[0])
        )
        for form in cast(Any, list(self)):
            outer, inner = (0, 1) if isinstance(form, TwoFactorEmbedding) else (1, 0)
            form[outer].weight, form[inner].weight = table.weight, other.weight

    def assign(self, table: torch.Tensor, other: torch.Tensor, layers: TiedLayers) -> None:
        """Make U (n, rank) and Vᵀ (d, rank), copied, the factors, and the layers' biases theirs."""
        for form, layer in zip(self, layers, strict=True):
            order = (table, other) if isinstance(form, TwoFactorEmbedding) else (other, table)
            assign_factors(cast(nn.Sequential, form), order, layer)
        self.train(layers.training)
        self.tie()

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        wanted = TiedTwoFactorLinear if tensor.is_floating_point() else TwoFactorEmbedding
        return next(form for form in self if isinstance(form, wanted))(tensor)

    def to_dense(self) -> TiedLayers:
        """The `TiedLayers` that this represents: they share one weight."""
        dense = [cast(Any, form).to_dense() for form in self]
        for layer in dense:
            layer.weight = dense[0].weight
        return TiedLayers(dense)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "TiedTwoFactor":
        # Off the meta device every module would get parameters of its own.
        super()._apply(fn, recurse)
        self.tie()
        return self


class TiedTwoFactorLinear(nn.Sequential):
    """x ↦ U (Vᵀ)ᵀ x + b, of factors that an embedding looks up: `TransposedLinear`, `Linear`."""

    def to_dense(self) -> nn.Linear:
        """The `nn.Linear` that this represents."""
        first, last = cast(TransposedLinear, self[0]), cast(nn.Linear, self[1])
        dense = nn.Linear(
            len(first.weight), last.out_features, last.bias is not None, "meta", first.weight.dtype
        )
        fill_dense(dense, last.weight @ first.weight.mT, self)
        return dense
