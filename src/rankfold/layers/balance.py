"""Factors brought to one scale.

Adam moves every weight by about the learning rate, whatever its size. A factor of small weights
beside one of large ones is so thrown about while the other hardly moves; a product says nothing of
how its scale is shared out, so that it can be shared out evenly at no cost.
"""

import math
from typing import Any, cast

import torch
from torch import nn

from rankfold.layers.form import factors_of


def balance_factors(model: nn.Module) -> None:
    """Give the factors of every chain the same root mean square, in place.

    Of the forms that are a chain of linear maps with nothing between them; what they do stays the
    same to rounding. Factors that are frozen, shared, not finite or zero are left as they are.
    """
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    for form in model.modules():
        if not isinstance(form, nn.Sequential) or not hasattr(form, "to_dense"):
            continue
        weights = [cast(torch.Tensor, factor.weight) for factor in factors_of(form)]
        is_chain = len(weights) == len(form) and all(_is_linear(factor) for factor in form)
        if is_chain and all(one.requires_grad and uses.get(id(one)) == 1 for one in weights):
            _balance(weights)


def _is_linear(factor: Any) -> bool:
    """A layer of torch's own; only the last of a chain has a bias."""
    return isinstance(factor, nn.Linear | nn.modules.conv._ConvNd)


def _balance(weights: list[torch.Tensor]) -> None:
    sizes = [one.detach().double().square().mean().sqrt().item() for one in weights]
    if not all(math.isfinite(size) and size > 0 for size in sizes):
        return
    even = math.exp(sum(map(math.log, sizes)) / len(sizes))
    with torch.no_grad():
        for one, size in zip(weights, sizes, strict=True):
            one.mul_(even / size)
