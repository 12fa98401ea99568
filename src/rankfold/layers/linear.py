"""A linear layer as two thin ones."""

from typing import cast

import torch
from torch import nn

from rankfold.layers.form import check_ranks, fill_dense


class TwoFactorLinear(nn.Sequential):
    """`Linear(in, rank, bias=False)` then `Linear(rank, out)`: W ≈ second.weight first.weight."""

    def __init__(
        self, layer: nn.Linear, rank: int, device: torch.device | str | None = None
    ) -> None:
        """The shape, bias and dtype of `layer`, with torch's initial values; on `device`, or its.

        Raises RankError for a rank outside 1..min(in, out).
        """
        check_ranks((rank,), (min(layer.in_features, layer.out_features),), layer)
        device, dtype = device or layer.weight.device, layer.weight.dtype
        super().__init__(
            nn.Linear(layer.in_features, rank, bias=False, device=device, dtype=dtype),
            nn.Linear(rank, layer.out_features, layer.bias is not None, device, dtype),
        )

    def to_dense(self) -> nn.Linear:
        """The `nn.Linear` that this represents."""
        first, last = cast(nn.Linear, self[0]), cast(nn.Linear, self[1])
        dense = nn.Linear(
            first.in_features, last.out_features, last.bias is not None, "meta", first.weight.dtype
        )
        fill_dense(dense, last.weight @ first.weight, self)
        return dense
