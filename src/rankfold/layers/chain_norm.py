"""The norm of a product of factors, without the product."""

from collections.abc import Sequence

import torch


def squared_norm_of_chain(links: Sequence[tuple[torch.Tensor, int]]) -> torch.Tensor:
    """The squared Frobenius norm of the weight that a chain represents, differentiable.

    Of each link, the first one first, its weight (out, in / groups, *kernel) and its groups; no two
    links share an axis of the kernel. From Gram matrices: ‖U V‖² = tr(UᵀU VVᵀ), link by link. With
    c channels in between this takes c² numbers, whatever the sides of the whole weight.
    """
    *others, (last, groups) = [(_blocks(weight, groups), groups) for weight, groups in links]
    gram: torch.Tensor | None = None  # of the channels so far, (channels, channels)
    for blocks, groups_of_link in others:
        if gram is None:
            own = torch.einsum("gomk,gpmk->gop", blocks, blocks)
            gram = torch.block_diag(*own) if groups_of_link > 1 else own[0]
            continue
        halfway = torch.einsum("gomk,gmhn->gokhn", blocks, _apart(gram, groups_of_link))
        gram = torch.einsum("gokhn,hpnk->gohp", halfway, blocks).flatten(2).flatten(0, 1)
    if gram is None:
        return last.square().sum()
    within = _apart(gram, groups).diagonal(dim1=0, dim2=2)
    return torch.einsum("mng,gomk,gonk->", within, last, last)


def _blocks(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """(groups, out / groups, in / groups, places of the kernel)."""
    return weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)


def _apart(gram: torch.Tensor, groups: int) -> torch.Tensor:
    """(groups, channels / groups, groups, channels / groups)."""
    return gram.unflatten(1, (groups, -1)).unflatten(0, (groups, -1))
