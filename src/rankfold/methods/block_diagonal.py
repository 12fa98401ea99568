"""Block diagonal plus low rank: what groups of channels tell each other, and what all do.

A 1x1 convolution has no kernel to separate and often no low rank either; where its singular values
fall slowly, blocks on the diagonal keep as much of it as their share of the cost. The sum is fitted
as a sparse plus low-rank matrix (Yu et al. 2017) of known support: by turns, each part the best one
for what the other leaves (as in GoDec: Zhou and Tao 2011), here in any metric.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import ClassVar

import torch
from torch import nn

from rankfold.decompose.decomposition import working_precision
from rankfold.decompose.matrix import leading_eigenvectors
from rankfold.layers import (
    BlockDiagonalConvolution,
    BlockDiagonalLinear,
    Dense,
    assign_factors,
    block_diagonal_limits,
    possible_groups,
)
from rankfold.layers.chain import kernel_of
from rankfold.methods.alternating import descend
from rankfold.methods.method import Rank, aligned_ranks, check_alignment, why_not_dense
from rankfold.methods.moments import WEIGHT_METRIC, Moments
from rankfold.methods.sampled import SampledFamily
from rankfold.methods.svd import low_rank_factors

# Turns of a fit whose loss is an estimate, and of the one built.
_DRAFT, _TURNS = 8, 40
_IMPROVEMENT = 1e-3  # share of the squared error: less ends the turns
_EXACT = 1e-20  # share of the weight's square that is rounding
_RIDGE = 1e-8  # of the mean eigenvalue, added to all of a moment's block that is inverted


@dataclass(frozen=True)
class BlockDiagonal:
    """W ≈ diag(W_1, ..., W_g) + U V: a layer in groups, and two factors of all channels beside it.

    Groups are of neighbouring channels. Ranks are (inputs of a group, rank of U V); there are at
    least two groups, and each number of groups is a multiple of the one before. Takes linear layers
    and ungrouped convolutions of any kernel whose channels can be divided. Fits find local optima.
    """

    name: ClassVar[str] = "block-diagonal"
    makes_chains: ClassVar[bool] = False
    alignment: int = 8

    def __post_init__(self) -> None:
        check_alignment(self.alignment)

    def why_not(self, layer: nn.Module) -> str | None:
        if (reason := why_not_dense(layer)) is not None:
            return reason
        outputs, inputs = layer.get_parameter("weight").shape[:2]
        if block_diagonal_limits(layer)[0] == 0:  # type: ignore[arg-type]
            return f"no groups divide both {inputs} inputs and {outputs} outputs"
        return None

    def fit(self, layer: Dense, moments: Moments) -> SampledFamily:
        fit = _Fit(layer, moments)
        widths, limits = _widths(layer, self.alignment), block_diagonal_limits(layer)
        saved = fit.weight.numel() * (1 - widths[0] / layer.weight.shape[1])
        saving = max(int(saved / sum(fit.weight.flatten(1).shape)), self.alignment)
        ranks = [rank for rank in aligned_ranks(limits[1], self.alignment) if rank <= saving]
        ranks = sorted({*ranks, limits[1]})
        return SampledFamily(
            layer, moments, list(product(widths, ranks)), limits, fit.refined, fit.drafted
        )

    def skeleton(self, layer: Dense, rank: Rank) -> nn.ModuleList:
        return _form(layer, rank)


@dataclass(frozen=True, eq=False)
class _Fit:
    """Blocks and low rank of one weight in a metric."""

    layer: Dense
    moments: Moments

    @cached_property
    def weight(self) -> torch.Tensor:
        """(out, in, *kernel), float64."""
        return working_precision(self.layer.weight.detach()).double()

    def drafted(self, rank: Rank) -> nn.ModuleList:
        return self._fitted(rank, _DRAFT)

    def refined(self, rank: Rank) -> nn.ModuleList:
        return self._fitted(rank, _TURNS)

    def _fitted(self, rank: Rank, turns: int) -> nn.ModuleList:
        """First in the weight metric, whose optimum is soon found: in the other from there on."""
        form, weight = _form(self.layer, rank), self.weight
        groups = weight.shape[1] // rank[0]
        blocks = weight.new_zeros(groups, len(weight) // groups, rank[0], *weight.shape[2:])
        if not self.moments.is_plain:
            blocks = _alternate(weight, blocks, rank[1], WEIGHT_METRIC, turns)
        blocks = _alternate(weight, blocks, rank[1], self.moments, turns)
        left, right = _low_rank(weight - _placed(blocks), rank[1], self.moments)
        assign_factors(form, (blocks, right, left), self.layer)
        return form


def _alternate(
    weight: torch.Tensor, blocks: torch.Tensor, rank: int, moments: Moments, turns: int
) -> torch.Tensor:
    """The blocks after turns with Nesterov's momentum, which starts anew where the error rises.

    Products with the inputs' moment take nearly all of the time; that of the whole weight is taken
    once, and those of the blocks skip the zeros around them.
    """
    invert = _inverse_of_blocks(len(blocks), moments)
    flat, response = weight.flatten(1), moments.times_inputs(weight)
    whole = (moments.times_gradients(flat) * response).sum().item()
    responses = _blocks_times_inputs(blocks, moments)
    before, error, run = (blocks, responses), float("inf"), 0

    def normal(direction: torch.Tensor) -> torch.Tensor:
        return _diagonal_times_gradients(_blocks_times_inputs(direction, moments), blocks, moments)

    for _ in range(turns):
        momentum = run / (run + 3)
        ahead = blocks + momentum * (blocks - before[0])
        rest_response = response - responses - momentum * (responses - before[1])
        left, right, right_response = _projection(
            flat - _placed(ahead).flatten(1), rest_response, rank, moments
        )
        residual = _diagonal_times_gradients(rest_response - left @ right_response, blocks, moments)
        found = descend(ahead, residual, normal, invert)
        found_responses = _blocks_times_inputs(found, moments)
        difference = flat - left @ right - _placed(found).flatten(1)
        missed = response - left @ right_response - found_responses
        reached = (moments.times_gradients(difference) * missed).sum().item()
        if reached > error and run:
            before, run = (blocks, responses), 0
            continue
        if not reached < error:
            break
        before, run = (blocks, responses), run + 1
        blocks, responses = found, found_responses
        gained, error = error - reached, reached
        if error <= _EXACT * whole or gained < _IMPROVEMENT * error:
            break
    return blocks


def _projection(
    weight: torch.Tensor, response: torch.Tensor, rank: int, moments: Moments
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best factors (out, rank) and (rank, in * kernel) of a weight, and the latter times A.

    `response` is the weight times A, the inputs' moment, both (out, in * kernel). By the
    eigenvectors of the smaller side: exact at full rank, however small singular values are.
    """
    rows, columns = weight.shape
    if rows <= columns or (moments.inputs is not None and len(moments.inputs) != columns):
        root, inverse = moments.output_roots or (None, None)
        turned, turned_response = (
            one if root is None else root @ one for one in (weight, response)
        )
        vectors = leading_eigenvectors(turned_response @ turned.mT)[1][:, :rank]
        left = vectors if inverse is None else inverse @ vectors
        return left, vectors.mT @ turned, vectors.mT @ turned_response
    root, inverse = moments.input_roots or (None, None)
    turned = weight if root is None else weight @ root
    vectors = leading_eigenvectors(turned.mT @ moments.times_gradients(turned))[1][:, :rank]
    right = vectors.mT if inverse is None else vectors.mT @ inverse
    return turned @ vectors, right, moments.times_inputs(right)


def _blocks_times_inputs(blocks: torch.Tensor, moments: Moments) -> torch.Tensor:
    """B A for the weight B of blocks (groups, out, in, *kernel): (all outputs, inputs * kernel)."""
    if moments.inputs is None:
        return _placed(blocks).flatten(1)
    rows = moments.inputs.reshape(len(blocks), -1, len(moments.inputs))
    split = blocks.reshape(*blocks.shape[:2], rows.shape[1], -1)  # places last, or none
    return torch.einsum("goip,gij->gojp", split, rows).flatten(0, 1).flatten(1)


def _diagonal_times_gradients(
    response: torch.Tensor, blocks: torch.Tensor, moments: Moments
) -> torch.Tensor:
    """The blocks on the diagonal of G X, in the shape of `blocks`, for X (out, in * kernel)."""
    groups = len(blocks)
    if moments.gradients is None:
        split = response.reshape(groups, blocks.shape[1], groups, -1)
        return split.diagonal(dim1=0, dim2=2).movedim(-1, 0).reshape(blocks.shape)
    rows = moments.gradients.reshape(groups, blocks.shape[1], -1)
    return (rows @ response.reshape(len(response), groups, -1).movedim(1, 0)).reshape(blocks.shape)


def _low_rank(
    weight: torch.Tensor, rank: int, moments: Moments
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best factors of a weight (out, in, *kernel): (out, rank) and (rank, in * kernel)."""
    left, right, _ = low_rank_factors(weight, moments)
    return left[:, :rank], right[:rank]


def _form(layer: Dense, rank: Rank) -> nn.ModuleList:
    if isinstance(layer, nn.Linear):
        return BlockDiagonalLinear(layer, rank, device="meta")
    return BlockDiagonalConvolution(layer, rank, device="meta")


def _widths(layer: Dense, alignment: int) -> list[int]:
    """Inputs of a group, ascending: aligned ones on both sides, and those of the fewest groups.

    Of each, groups are divided further by the next, so that what fits these fits it too.
    """
    outputs, inputs = layer.weight.shape[:2]
    taken = possible_groups(layer)[:1]
    for groups in possible_groups(layer):
        sides = outputs // groups, inputs // groups
        if groups > taken[-1] and groups % taken[-1] == 0 and not any(n % alignment for n in sides):
            taken.append(groups)
    return sorted(inputs // groups for groups in taken)


def _placed(blocks: torch.Tensor) -> torch.Tensor:
    """The weight (out, in, *kernel) of blocks (groups, out, in, *kernel)."""
    return kernel_of([(blocks.flatten(0, 1), len(blocks))])


def _inverse_of_blocks(groups: int, moments: Moments) -> Callable[[torch.Tensor], torch.Tensor]:
    """Of the normal equations of the blocks, each by itself: what conjugate gradients start from.

    Exact where groups have nothing to do with each other, and where the gradients are not weighed.
    """
    gradients, inputs = (
        None if moment is None else _inverses(moment, groups)
        for moment in (moments.gradients, moments.inputs)
    )

    def apply(residual: torch.Tensor) -> torch.Tensor:
        found = residual.flatten(2)
        if gradients is not None:
            found = gradients @ found
        if inputs is not None:
            # The moment of whole patches, or of channels, the same at every place.
            by_column = found.reshape(*found.shape[:2], inputs.shape[-1], -1)
            found = torch.einsum("goip,gij->gojp", by_column, inputs)
        return found.reshape(residual.shape)

    return apply


def _inverses(moment: torch.Tensor, groups: int) -> torch.Tensor:
    """Of the blocks on the diagonal: (groups, n, n)."""
    size = len(moment) // groups
    blocks = moment.reshape(groups, size, groups, size).diagonal(dim1=0, dim2=2).movedim(2, 0)
    mean = blocks.diagonal(dim1=1, dim2=2).mean(1)
    ridge = torch.where(mean > 0, _RIDGE * mean, 1)[:, None, None] * torch.eye(size).to(blocks)
    lower, failed = torch.linalg.cholesky_ex(blocks + ridge)
    while failed.any():
        ridge = 10 * ridge
        lower, failed = torch.linalg.cholesky_ex(blocks + ridge)
    return torch.cholesky_inverse(lower)
