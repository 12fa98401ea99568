"""Groups of outputs and of inputs, and between any two of them a block of low rank.

Denton, Zaremba, Bruna, LeCun, Fergus: Exploiting linear structure within convolutional networks for
efficient evaluation. NIPS 2014 (section 3.2): outputs and inputs are clustered, each block of the
kernel is approximated by itself. Here clusters are balanced, and blocks are fitted to what the
errors of the others leave to be made up for.

Of the paper's distances Frobenius' is the weight metric, in which blocks have nothing to do with
each other; that of the data's covariance is the response metric, and Mahalanobis', from the
covariance of the gradients, is that of the fisher metric.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any, ClassVar

import torch
from torch import nn

from rankfold.decompose import rank_one_terms
from rankfold.decompose.decomposition import working_precision
from rankfold.layers import (
    BiclusteredConvolution,
    Convolution,
    assign_factors,
    check_ranks,
    factors_of,
)
from rankfold.methods.method import Rank, aligned_ranks, check_alignment, why_not_spatial
from rankfold.methods.moments import Moments
from rankfold.methods.refit import improved_last_factor, of_equal_norms, solve
from rankfold.methods.sampled import SampledFamily
from rankfold.methods.subspace_clusters import balanced_clusters
from rankfold.methods.tucker2 import Tucker2

# Sweeps over the blocks of a fit whose loss is an estimate, and of the one built.
_DRAFT, _SWEEPS = 1, 3
# Of the search for one outer product; the relative error whose gain ends it.
_ITERATIONS, _IMPROVEMENT = 10, 1e-4
_EXACT = 1e-20  # share of the weight's square that is rounding
# Of the mean eigenvalue of the inputs' moment, added to all: what no input shows stays as it is.
_LEAST = 1e-10

_KINDS = ("svd", "outer-product")
# Of a block, float64: inputs (r_in, in), core (r_out, r_in or 1, places), outputs (out, r_out).
_Block = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Bicluster:
    """K[g, h] ≈ out core in for each output group g and input group h: 1x1, kxk, 1x1, all grouped.

    `blocks` are "svd", of two ranks (r_out, r_in) as in Tucker-2, or "outer-product", of a number
    of terms found one at a time, with a depthwise kxk. Takes ungrouped convolutions with a kernel
    larger than 1x1, whose channels the groups divide into ones of `alignment` or more, on one side
    more. The channels are put in the order of their groups before, and in their own after, which
    costs time and no MACs. Fits find local optima.
    """

    name: ClassVar[str] = "bicluster"
    makes_chains: ClassVar[bool] = False
    alignment: int = 8
    blocks: str = "svd"
    output_groups: int = 2
    input_groups: int = 2

    def __post_init__(self) -> None:
        check_alignment(self.alignment)
        if self.blocks not in _KINDS:
            raise ValueError(f"blocks are one of {', '.join(_KINDS)}, not {self.blocks!r:.40}")
        for side, count in (("output", self.output_groups), ("input", self.input_groups)):
            if type(count) is not int or count < 1:
                raise ValueError(f"{side}_groups is an integer of at least 1, not {count!r:.40}")

    @property
    def groups(self) -> tuple[int, int]:
        """Of outputs, of inputs."""
        return self.output_groups, self.input_groups

    def why_not(self, layer: nn.Module) -> str | None:
        if (reason := why_not_spatial(layer)) is not None:
            return reason
        shape = layer.get_parameter("weight").shape
        for side, channels, groups in zip(("output", "input"), shape, self.groups, strict=False):
            if channels % groups:
                return f"{groups} groups do not divide {channels} {side} channels"
        outputs, inputs = (n // groups for n, groups in zip(shape, self.groups, strict=False))
        if min(outputs, inputs) < self.alignment or max(outputs, inputs) == self.alignment:
            return f"only {inputs} input and {outputs} output channels in a group"
        return None

    def fit(self, layer: Convolution, moments: Moments) -> SampledFamily:
        tensor = working_precision(layer.weight.detach()).double().flatten(2)
        fit = _Fit(layer, tensor, moments, self)
        limits = self._limits(layer)
        if self.blocks == "outer-product":
            sizes = self._sizes(layer)
            saving = (math.prod(sizes) - 1) // sum(sizes)
            ranks = [rank for rank in aligned_ranks(limits[0], self.alignment) if rank <= saving]
            candidates: list[Rank] = [(rank,) for rank in ranks or limits]
        else:
            candidates = list(product(*(aligned_ranks(n, self.alignment) for n in limits)))
        return SampledFamily(layer, moments, candidates, limits, fit.refined, fit.drafted)

    def skeleton(self, layer: Convolution, rank: Rank) -> nn.Sequential:
        orders = (torch.arange(layer.out_channels), torch.arange(layer.in_channels))
        return self.form(layer, rank, orders, device="meta")

    def form(
        self,
        layer: Convolution,
        rank: Rank,
        orders: tuple[torch.Tensor, torch.Tensor],
        device: str | None = None,
    ) -> BiclusteredConvolution:
        """With the orders of outputs and inputs; raises RankError."""
        check_ranks(rank, self._limits(layer), layer)
        ranks = (rank[0], rank[-1])
        depthwise = self.blocks == "outer-product"
        return BiclusteredConvolution(layer, self.groups, ranks, orders, depthwise, device)

    def _sizes(self, layer: Convolution) -> tuple[int, int, int]:
        """Of a block: outputs, inputs, places."""
        outputs, inputs, *kernel = layer.weight.shape
        places = torch.Size(kernel).numel()
        return outputs // self.output_groups, inputs // self.input_groups, places

    def _limits(self, layer: Convolution) -> Rank:
        outputs, inputs, places = self._sizes(layer)
        if self.blocks == "outer-product":
            return (outputs * inputs * places // max(outputs, inputs, places),)
        return min(outputs, inputs * places), min(inputs, outputs * places)


@dataclass(frozen=True, eq=False)
class _Fit:
    """The blocks of one kernel, in the order of its groups."""

    layer: Convolution
    tensor: torch.Tensor  # (out, in, places), float64, in the layer's order
    moments: Moments
    method: Bicluster

    @cached_property
    def orders(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of outputs, then of inputs; each as seen from the groups of the other side.

        In the metric, but for what errors of different outputs, and of the inputs of different
        groups, have to do with each other.
        """
        tensor, count = self.tensor, self.method.groups
        channels = self.moments.of_channels(tensor.shape[1])
        if channels.gradients is not None:
            tensor = tensor * channels.gradients.diagonal().clamp_min(0).sqrt()[:, None, None]
        seen = channels.times_inputs(tensor).flatten(1)
        outputs = balanced_clusters((tensor.flatten(1) @ seen.mT)[None], count[0])
        if channels.inputs is not None:
            tensor = tensor * channels.inputs.diagonal().clamp_min(0).sqrt()[:, None]
        views = tensor[outputs].unflatten(0, (count[0], -1)).movedim(2, 1).flatten(2)
        inputs = balanced_clusters(views @ views.mT, count[1])
        return outputs, inputs

    @cached_property
    def _weight(self) -> torch.Tensor:
        return self.tensor[self.orders[0]][:, self.orders[1]]

    @cached_property
    def _sorted(self) -> Moments:
        """The moments of the channels in their groups' order."""
        moments, (outputs, inputs) = self.moments.damped(_LEAST), self.orders
        gradients, patches = moments.gradients, moments.inputs
        if gradients is not None:
            gradients = gradients[outputs][:, outputs]
        if patches is not None:
            by_channel = patches.reshape(len(inputs), -1, len(inputs), len(patches) // len(inputs))
            patches = by_channel[inputs][:, :, inputs].reshape(patches.shape)
        return Moments(patches, gradients)

    def drafted(self, rank: Rank) -> BiclusteredConvolution:
        return self._form(rank, _DRAFT)

    def refined(self, rank: Rank) -> BiclusteredConvolution:
        return self._form(rank, _SWEEPS)

    def _form(self, rank: Rank, sweeps: int) -> BiclusteredConvolution:
        layer = self.layer
        form = self.method.form(layer, rank, self.orders)
        blocks = self._swept(rank, sweeps)
        of_outputs, of_inputs = (range(count) for count in self.method.groups)
        pairs = [blocks[g, h] for h in of_inputs for g in of_outputs]
        # Of an output group, shuffled channels of the same number from all blocks stand together.
        mode = 2 if min(self.method.groups) > 1 else 1
        lasts = [
            torch.stack([blocks[g, h][2] for h in of_inputs], mode).flatten(1) for g in of_outputs
        ]
        first, core = (torch.cat([pair[k] for pair in pairs]) for k in (0, 1))
        chain = nn.Sequential(*factors_of(form))
        assign_factors(chain, of_equal_norms([first, core, torch.cat(lasts)]), layer)
        bias: Any = chain[-1].bias
        if bias is not None:
            bias.data = bias.data[self.orders[0]]
        return form.train(layer.training)

    def _swept(self, rank: Rank, sweeps: int) -> dict[tuple[int, int], _Block]:
        """All blocks, each fitted in turn to what makes up best for the errors of the others."""
        weight, moments = self._weight, self._sorted
        error, whole = float("inf"), moments.squared_error(weight)
        found: dict[tuple[int, int], _Block] = {}
        difference = torch.zeros_like(weight)
        for _ in range(sweeps):
            candidates, ahead = {}, difference.clone()
            for g, h in product(*(range(count) for count in self.method.groups)):
                rows, columns = self._slices(g, h)
                ahead[rows, columns] = 0
                own = self._moments_of(rows, columns)
                aim = weight[rows, columns] - self._left(ahead, rows, columns, own)
                block = self._fitted(aim, own, rank)
                candidates[g, h] = block
                ahead[rows, columns] = self._multiplied(block) - weight[rows, columns]
            reached = moments.squared_error(ahead)
            if not reached < error:
                break
            found, difference, error = candidates, ahead, reached
            if moments.is_plain or error <= _EXACT * whole:
                break
        return found

    def _slices(self, g: int, h: int) -> tuple[slice, slice]:
        """The outputs and inputs of a block."""
        outputs, inputs = (
            length // count
            for length, count in zip(self._weight.shape, self.method.groups, strict=False)
        )
        return slice(g * outputs, (g + 1) * outputs), slice(h * inputs, (h + 1) * inputs)

    def _moments_of(self, rows: slice, columns: slice) -> Moments:
        gradients, patches = self._sorted.gradients, self._sorted.inputs
        if gradients is not None:
            gradients = gradients[rows, rows]
        if patches is not None:
            places = len(patches) // self._weight.shape[1]
            wide = slice(columns.start * places, columns.stop * places)
            patches = patches[wide, wide]
        return Moments(patches, gradients)

    def _left(
        self, difference: torch.Tensor, rows: slice, columns: slice, own: Moments
    ) -> torch.Tensor:
        """What the errors of other blocks are in the coordinates of one: G⁻¹ (G Δ A) A⁻¹ there."""
        moments = self._sorted
        if moments.is_plain or not difference.any():
            return difference[rows, columns]
        seen = moments.times_inputs(difference).reshape(difference.shape)[:, columns]
        if moments.gradients is None or own.gradients is None:
            seen = seen[rows]
        else:
            seen = torch.tensordot(moments.gradients[rows], seen, dims=1)
            seen = solve(own.gradients, seen.flatten(1).mT).mT.reshape(seen.shape)
        if own.inputs is None:
            return seen
        if len(own.inputs) == seen.shape[1]:
            return solve(own.inputs, seen.mT).mT
        return solve(own.inputs, seen.flatten(1)).reshape(seen.shape)

    def _fitted(self, aim: torch.Tensor, moments: Moments, rank: Rank) -> _Block:
        if self.method.blocks == "outer-product":
            return _outer_products(aim, moments, rank[0])
        outputs, inputs, _ = aim.shape
        one = type(self.layer)(inputs, outputs, self.layer.kernel_size, device="meta")  # type: ignore[arg-type]
        one.weight = nn.Parameter(aim.reshape(outputs, inputs, *self.layer.kernel_size))
        first, core, last = factors_of(Tucker2(alignment=1).fit(one, moments).build(rank))
        return first.weight.flatten(1), core.weight.flatten(2), last.weight.flatten(1)

    def _multiplied(self, block: _Block) -> torch.Tensor:
        """(out, in, places)."""
        first, core, last = block
        if self.method.blocks == "outer-product":
            return torch.einsum("or,rp,ri->oip", last, core[:, 0], first)
        return torch.einsum("oq,qrp,ri->oip", last, core, first)


def _outer_products(aim: torch.Tensor, moments: Moments, terms: int) -> _Block:
    """Greedily in the metric of channels, then the outputs best in that of patches."""
    channels = moments.of_channels(aim.shape[1])
    known = {0: channels.gradients, 1: channels.inputs}
    weights = {mode: moment for mode, moment in known.items() if moment is not None}
    found = rank_one_terms(
        aim, terms, weights=weights, iterations=_ITERATIONS, improvement=_IMPROVEMENT
    )
    outputs, inputs, filters = (factor.double() for factor in found.factors)
    features = torch.einsum("ir,pr->rip", inputs, filters)
    last = improved_last_factor(aim, outputs * found.norms, features, moments)
    return inputs.mT, filters.mT[:, None], last
