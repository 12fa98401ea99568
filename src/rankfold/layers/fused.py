"""A linear layer whose outputs are several layers' side by side, each of a rank of its own."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from rankfold.layers.form import check_ranks


class FusedTwoFactorLinear(nn.Module):
    """`Linear(in, Σ r_i, bias=False)`, and of each r_i of its outputs a `Linear(r_i, out / parts)`.

    Of one layer that makes queries, keys and values together: three pairs of factors, of which the
    first ones are multiplied at once.
    """

    def __init__(
        self, layer: nn.Linear, ranks: Sequence[int], device: torch.device | str | None = None
    ) -> None:
        """The shape, bias and dtype of `layer`, in as many equal parts as there are ranks.

        On `device`, or that of `layer`. Raises RankError for a rank outside
        1..min(in, out / parts).
        """
        width = layer.out_features // len(ranks)
        check_ranks(ranks, [min(layer.in_features, width)] * len(ranks), layer)
        super().__init__()
        device, dtype = device or layer.weight.device, layer.weight.dtype
        bias = layer.bias is not None
        self.first = nn.Linear(layer.in_features, sum(ranks), False, device, dtype)
        self.last = nn.ModuleList(nn.Linear(rank, width, bias, device, dtype) for rank in ranks)
        self.ranks = tuple(ranks)

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        parts = self.first(tensor).split(self.ranks, -1)
        return torch.cat([last(part) for last, part in zip(self.last, parts, strict=True)], -1)

    def to_dense(self) -> nn.Linear:
        """The `nn.Linear` that this represents."""
        lasts = cast("list[nn.Linear]", list(self.last))
        weights = zip(lasts, self.first.weight.split(self.ranks), strict=True)
        weight = torch.cat([last.weight @ first for last, first in weights]).detach()
        has_bias = lasts[0].bias is not None
        outputs = sum(last.out_features for last in lasts)
        dense = nn.Linear(self.first.in_features, outputs, has_bias, "meta", weight.dtype)
        dense.weight = nn.Parameter(weight, self.first.weight.requires_grad)
        if has_bias:
            bias = torch.cat([last.bias for last in lasts]).detach()
            dense.bias = nn.Parameter(bias, lasts[0].bias.requires_grad)
        return dense.train(self.training)
