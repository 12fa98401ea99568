"""Unfoldings and mode products (Kolda and Bader, SIAM Review 51, 2009, sections 2.4 and 2.5).

All take a batch: `batch_dims` leading dimensions count its members, and the modes come after them.
"""

import math
from collections.abc import Sequence
from functools import cache
from itertools import combinations

import torch

# From this many contiguous numbers on, many small products beat one of a permuted copy.
_WIDE = 32
# Rows in a block of a symmetric product: enough for full speed, few enough to save a third.
_BLOCK = 128


def unfold(tensor: torch.Tensor, mode: int, batch_dims: int = 0) -> torch.Tensor:
    """The mode-`mode` unfolding: (..., length of the mode, product of the others)."""
    moved = tensor.movedim(batch_dims + mode, batch_dims)
    return moved.reshape(*moved.shape[: batch_dims + 1], -1)


def mode_product(
    tensor: torch.Tensor, matrix: torch.Tensor, mode: int, batch_dims: int = 0
) -> torch.Tensor:
    """Mode product, tensor x_mode matrix, for matrices (..., new length, length of the mode)."""
    axis = batch_dims + mode
    batch, before = tensor.shape[:batch_dims], tensor.shape[batch_dims:axis]
    after = tensor.shape[axis + 1 :]
    # Where the layout allows it the mode is multiplied in place, without a permuted copy.
    if math.prod(after) == 1:
        product = tensor.reshape(*batch, -1, tensor.shape[axis]) @ matrix.mT
    elif math.prod(before) == 1:
        product = matrix @ tensor.reshape(*batch, tensor.shape[axis], -1)
    elif math.prod(after) >= _WIDE:
        slices = tensor.reshape(*batch, -1, tensor.shape[axis], math.prod(after))
        product = matrix.unsqueeze(-3) @ slices
    else:
        product = matrix @ unfold(tensor, mode, batch_dims)
        unfolded = product.reshape(*batch, matrix.shape[-2], *before, *after)
        return unfolded.movedim(batch_dims, axis)
    return product.reshape(*batch, *before, matrix.shape[-2], *after)


def mode_gram(tensor: torch.Tensor, mode: int, batch_dims: int = 0) -> torch.Tensor:
    """The unfolding times its transpose: (..., length of the mode, length of the mode)."""
    if batch_dims + mode == tensor.dim() - 1:
        return gram(tensor.reshape(*tensor.shape[:batch_dims], -1, tensor.shape[-1]).mT)
    return gram(unfold(tensor, mode, batch_dims))


def gram(matrix: torch.Tensor) -> torch.Tensor:
    """The product matrix @ matrix.mT, each inner product of two rows of blocks computed once."""
    rows = matrix.shape[-2]
    if rows < 2 * _BLOCK:
        return matrix @ matrix.mT
    product = matrix.new_empty(*matrix.shape[:-1], rows)
    for start in range(0, rows, _BLOCK):
        end = start + _BLOCK
        above = matrix[..., start:end, :] @ matrix[..., start:, :].mT
        product[..., start:end, start:] = above
        product[..., end:, start:end] = above[..., _BLOCK:].mT
    return product


def project(
    tensor: torch.Tensor,
    factors: Sequence[torch.Tensor],
    modes: Sequence[int],
    skip: int | None = None,
    batch_dims: int = 0,
) -> torch.Tensor:
    """The tensor multiplied by the transposed factor in every mode but the skipped one."""
    for mode, factor in zip(modes, factors, strict=True):
        if mode != skip:
            tensor = mode_product(tensor, factor.mT, mode, batch_dims)
    return tensor


def split_point(lengths: Sequence[int]) -> int:
    """The number of leading modes whose product is nearest to that of the others."""
    sizes = [0.0]
    for length in lengths:
        sizes.append(sizes[-1] + math.log(length))
    return min(range(1, len(lengths)), key=lambda k: abs(2 * sizes[k] - sizes[-1]))


@cache
def halves(lengths: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The modes in two groups, each ascending, with products as near to each other as can be.

    The last mode is in the second group. Of equal ones the groups of neighbouring modes are taken.
    """
    modes = range(len(lengths))
    firsts = [first for size in modes[1:] for first in combinations(modes[:-1], size)]
    whole = math.log(math.prod(lengths))

    def imbalance(first: tuple[int, ...]) -> tuple[float, int]:
        half = math.log(math.prod(lengths[mode] for mode in first))
        return round(abs(2 * half - whole), 9), first[-1] - len(first)

    first = min(firsts, key=imbalance)
    return first, tuple(mode for mode in modes if mode not in first)
