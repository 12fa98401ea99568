"""The factorized layers of a network as chains of factors, and what is dense beside them."""

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from rankfold.layers import (
    CONVOLUTIONS,
    TRANSPOSED,
    FusedTwoFactorLinear,
    StructuredLinear,
    TransposedLinear,
    UnfusedAttention,
)


@dataclass(frozen=True)
class Chain:
    """Linear maps with nothing between them: the factors of one weight, or of a part of it.

    Of each, the first one first, the weight (out, in / groups, *kernel) and the groups. No two
    share an axis of the kernel.
    """

    links: tuple[tuple[torch.Tensor, int], ...]

    @property
    def groups(self) -> int | None:
        """Of all links, if they have the same; those with others (CP, flattened) have None."""
        found = {groups for _, groups in self.links}
        return found.pop() if len(found) == 1 else None


def chains_of(form: nn.Module) -> list[Chain]:
    """What a factorized layer is made of; nothing if it is no chain, or none alone.

    Chains are the forms of two factors, of linear layers, embeddings and convolutions, and all
    convolutions of links (Tucker, separable, tensor train, CP, flattened, ...), grouped and
    transposed ones included.
    """
    if isinstance(form, FusedTwoFactorLinear):
        firsts = form.first.weight.split(form.ranks)
        lasts: Any = form.last
        return [
            Chain(((first, 1), (last.weight, 1))) for first, last in zip(firsts, lasts, strict=True)
        ]
    if not isinstance(form, nn.Sequential) or not hasattr(form, "to_dense"):
        return []
    links = [_link(module) for module in form]
    known = tuple(link for link in links if link is not None)
    return [Chain(known)] if len(known) == len(links) > 1 else []


def factorized_layers(model: nn.Module, pattern: str = "*") -> Iterator[tuple[str, nn.Module]]:
    """The chains of a network, and its layers of small tensors, whose name matches; each once."""
    seen: set[frozenset[int]] = set()
    for name, module in model.named_modules():
        if not fnmatchcase(name, pattern):
            continue
        if isinstance(module, StructuredLinear) or chains_of(module):
            weights = frozenset(id(own) for own in module.parameters() if own.dim() > 1)
            if weights not in seen:  # tied layers share their factors
                seen.add(weights)
                yield name, module


def dense_layers(model: nn.Module, pattern: str = "*") -> Iterator[tuple[str, torch.Tensor, int]]:
    """Name, weight and groups of torch's own linear layers and convolutions that are no factors."""
    factors = {
        id(own)
        for module in model.modules()
        if hasattr(module, "to_dense") and not isinstance(module, UnfusedAttention)
        for own in module.parameters()
    }
    seen: set[int] = set()
    for name, module in model.named_modules():
        link = _link(module)
        if link is None or isinstance(module, nn.Embedding) or not fnmatchcase(name, pattern):
            continue
        weight: Any = module.weight
        if id(weight) not in factors | seen:
            seen.add(id(weight))
            yield name, *link


def _link(module: Any) -> tuple[torch.Tensor, int] | None:
    """The weight (out, in / groups, *kernel) of one linear map of features, and its groups."""
    if isinstance(module, nn.Embedding | TransposedLinear):
        return module.weight.mT, 1
    if isinstance(module, nn.Linear):
        return module.weight, 1
    if isinstance(module, CONVOLUTIONS):
        return module.weight, module.groups
    if isinstance(module, TRANSPOSED):
        by_group = module.weight.unflatten(0, (module.groups, -1)).transpose(1, 2)
        return by_group.flatten(0, 1), module.groups
    return None
