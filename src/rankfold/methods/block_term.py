"""Block-term decomposition of a convolution's kernel: a sum of Tucker-2 blocks.

Of a linear layer's weight: a sum of Tucker blocks over pairs of modes of its outputs and inputs (Ye
et al.: Learning compact recurrent neural networks with block-term tensor decomposition. CVPR 2018).

De Lathauwer: Decompositions of a higher-order tensor in block terms, part II. SIAM Journal on
Matrix Analysis and Applications 30 (2008); part III, with Nion: by alternating least squares.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from rankfold.decompose import Weights, tucker
from rankfold.layers import (
    BlockTermConvolution,
    BlockTermLinear,
    Convolution,
    TensorNetworkLinear,
    assign_factors,
    block_term_limit,
    block_widths,
    check_ranks,
)
from rankfold.methods.alternating import Factors
from rankfold.methods.method import Rank, check_alignment, why_not_spatial
from rankfold.methods.moments import Moments
from rankfold.methods.refit import improved_last_factor, of_equal_norms
from rankfold.methods.sampled import SampledFamily
from rankfold.methods.tensor_network import (
    in_shapes_of,
    linear_form,
    linear_modes,
    network_family,
    paired,
    paired_weights,
    why_not_split,
)
from rankfold.methods.three_factors import ThreeFactors, in_turn
from rankfold.methods.whitened import CHANNELS, WhitenedKernel

# Sweeps of alternating least squares of a fit whose loss is an estimate, and of the one built.
_DRAFT, _SWEEPS = 6, 50
# From so many inputs for each of a block's, products of all pairs of blocks cost less than those of
# their features; and how many numbers they may have at a time.
_MANY, _MOST = 32, 2**24


@dataclass(frozen=True)
class BlockTerm:
    """K ≈ Σ_b out_b core_b in_b: 1x1 in→n w, kxk in n groups, 1x1 n w→out.

    Between CP, whose terms mix no channels, and Tucker-2, which has one core for all: a grouped
    convolution does more with each number that it loads than a depthwise one. Blocks are as wide as
    `alignment`, and a rank is their number n. Takes ungrouped convolutions with a kernel larger
    than 1x1 and channels for at least two blocks, and linear layers, whose features are split into
    so many `modes` on both sides. Fits find local optima.
    """

    name: ClassVar[str] = "block-term"
    alignment: int = 8
    modes: int = 3

    def __post_init__(self) -> None:
        check_alignment(self.alignment)
        if type(self.modes) is not int or self.modes < 1:
            raise ValueError(f"modes is an integer of at least 1, not {self.modes!r:.40}")

    def why_not(self, layer: nn.Module) -> str | None:
        if type(layer) is nn.Linear:
            return why_not_split(layer)
        return why_not_spatial(layer, channels=2 * self.alignment)

    def fit(self, layer: nn.Linear | Convolution, moments: Moments) -> SampledFamily:
        if isinstance(layer, nn.Linear):
            form, limit = partial(self._linear, layer), self._limit(layer)
            return network_family(layer, moments, form, _start, range(1, limit + 1))
        fit = _Fit(layer, moments, self.alignment)
        limit = block_term_limit(layer, self.alignment)
        w_out, w_in = block_widths(layer, self.alignment)
        places = fit.tensor.shape[2]
        block = w_in * layer.in_channels + w_in * w_out * places + w_out * layer.out_channels
        saving = (layer.weight.numel() - 1) // block
        candidates = [(count,) for count in range(1, min(saving, limit - 1) + 1)]
        return SampledFamily(
            layer,
            moments,
            [*candidates, (limit,)],
            (limit,),
            fit.refined,
            fit.drafted,
            exact=True,  # all pairs of groups are the tensor, and far too many to fit for that
        )

    def skeleton(self, layer: nn.Linear | Convolution, rank: Rank) -> nn.Module:
        if isinstance(layer, nn.Linear):
            check_ranks(rank, (self._limit(layer),), layer)
            return self._linear(layer, rank)
        check_ranks(rank, (block_term_limit(layer, self.alignment),), layer)
        return BlockTermConvolution(layer, rank[0], self.alignment, device="meta")

    def _linear(self, layer: nn.Linear, rank: Rank) -> BlockTermLinear:
        return linear_form(BlockTermLinear, layer, rank[0], self.alignment, modes=self.modes)

    def _limit(self, layer: nn.Linear) -> int:
        """The number of blocks that hold every weight: all combinations of groups of modes."""
        pairs = zip(*linear_modes(layer, self.modes), strict=True)
        return math.prod(-(-given * made // self.alignment) for given, made in pairs)


@dataclass(frozen=True)
class _Blocks(ThreeFactors):
    """Σ_b outputs[:, b] cores[b] inputs[:, b]ᵀ: a core for each block."""

    def features(self) -> torch.Tensor:
        return torch.einsum("bqrp,ibr->bqip", self.cores, self.inputs).flatten(0, 1)

    def onto_inputs(self, half: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bqip,bqrp->ibr", half, self.cores)

    def onto_cores(self, half: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bqip,ibr->bqrp", half, self.inputs)

    def gram(self) -> torch.Tensor:
        """Of many inputs from their inner products: blocks are narrow, features are not."""
        if len(self.inputs) < _MANY * self.inputs.shape[2]:
            return super().gram()
        parts = zip(self._with_inputs(self.cores), self._in_parts(self.cores), strict=True)
        products = [beside @ own.permute(0, 3, 2, 1).flatten(1, 2) for beside, own in parts]
        return torch.cat([one.transpose(0, 1).flatten(1) for one in products], dim=1)

    def normal(self, cores: torch.Tensor) -> torch.Tensor:
        """From inner products of outputs and of inputs, where the blocks have few of the latter."""
        if self.inputs[0].numel() >= len(self.inputs):
            return super().normal(cores)
        outputs = self._in_parts(_inner_products(self.outputs))
        parts = zip(self._with_inputs(cores), outputs, strict=True)
        products = torch.cat([own @ beside for beside, own in parts])
        return products.unflatten(2, (-1, cores.shape[2])).transpose(2, 3)

    def _with_inputs(self, cores: torch.Tensor) -> Iterator[torch.Tensor]:
        """Such cores and their inputs, in the inputs of each block, for some of these at a time.

        (blocks of the part, all blocks * out, places * in).
        """
        count, made, given, places = cores.shape
        tall = cores.transpose(2, 3).flatten(1, 2)
        for part in self._in_parts(_inner_products(self.inputs)):
            wide = part.unflatten(2, (count, given)).permute(2, 3, 0, 1).flatten(2)
            seen = (tall @ wide).reshape(count, made, places, len(part), given)
            yield seen.permute(3, 0, 1, 2, 4).reshape(len(part), count * made, places * given)

    def _in_parts(self, blocks: torch.Tensor) -> Sequence[torch.Tensor]:
        """So few blocks that all cores in the inputs of each fit in memory."""
        return blocks.split(max(1, _MOST // self.cores.numel()))

    def with_outputs(self, outputs: torch.Tensor) -> "_Blocks":
        """Orthonormal within each block."""
        outputs, mixing = torch.linalg.qr(outputs.movedim(1, 0))
        cores = torch.einsum("bsq,bqrp->bsrp", mixing, self.cores)
        return replace(self, outputs=outputs.movedim(0, 1), cores=cores)


def _inner_products(factor: torch.Tensor) -> torch.Tensor:
    """Of all columns of a factor (length, blocks, width): (blocks, width, blocks * width)."""
    flat = factor.flatten(1)
    return (flat.mT @ flat).unflatten(0, factor.shape[1:])


@dataclass(frozen=True, eq=False)
class _Fit(WhitenedKernel):
    """The blocks of one kernel: in the metric of channels, then the last factor in patches'."""

    width: int

    def drafted(self, rank: Rank) -> BlockTermConvolution:
        return self._form(rank, _DRAFT)

    def refined(self, rank: Rank) -> BlockTermConvolution:
        return self._form(rank, _SWEEPS)

    def _form(self, rank: Rank, sweeps: int) -> BlockTermConvolution:
        form = BlockTermConvolution(self.layer, rank[0], self.width, device="meta")
        found = _strongest(self.whitened, block_widths(self.layer, self.width), rank[0])
        found = in_turn(self.whitened, found, sweeps)
        found = _Blocks(
            self.whitening.restore(found.outputs.flatten(1), 0).reshape(found.outputs.shape),
            self.whitening.restore(found.inputs.flatten(1), 1).reshape(found.inputs.shape),
            found.cores,
        )
        last = improved_last_factor(
            self.tensor, found.outputs.flatten(1), found.features(), self.moments
        )
        factors = of_equal_norms([found.inputs.flatten(1).mT, found.cores.flatten(0, 1), last])
        assign_factors(form, factors, self.layer)
        return form


def _strongest(tensor: torch.Tensor, widths: tuple[int, int], count: int) -> _Blocks:
    """A start: those blocks of the core of the HOSVD that hold most, as many as asked for.

    The singular vectors of outputs and inputs are divided into groups in their order; each pair of
    groups is a block of the core, and together all pairs are the tensor.
    """
    hosvd = tucker(tensor, modes=CHANNELS)
    bases = []
    for factor, width in zip(hosvd.factors, widths, strict=True):
        groups = -(-len(factor) // width)
        missing = groups * width - factor.shape[1]
        bases.append(nn.functional.pad(factor, (0, missing)).unflatten(1, (-1, width)))
    outputs, inputs = bases
    half = torch.einsum("ogq,oip->gqip", outputs, tensor)
    cores = torch.einsum("gqip,ihr->ghqrp", half, inputs)
    energies = cores.square().sum((2, 3, 4)).flatten()
    chosen = energies.argsort(descending=True, stable=True)[:count]
    rows, columns = chosen // inputs.shape[1], chosen % inputs.shape[1]
    return _Blocks(outputs[:, rows], inputs[:, columns], cores[rows, columns])


def _start(
    form: TensorNetworkLinear, tensor: torch.Tensor, weights: Weights | None
) -> list[Factors]:
    """As `_strongest`, of the pairs of modes; all of them have groups."""
    hosvd = tucker(paired(tensor), weights=paired_weights(tensor, weights))
    count, *widths = form.factors[0].shape
    core, bases = hosvd.core, []
    for mode, (factor, width) in enumerate(zip(hosvd.factors, widths, strict=True)):
        missing = -len(factor) % width
        bases.append(nn.functional.pad(factor, (0, missing)).unflatten(1, (-1, width)))
        padding = [0, 0] * (core.dim() - 1 - 2 * mode) + [0, missing]
        core = nn.functional.pad(core, padding[: 2 * core.dim()]).unflatten(2 * mode, (-1, width))
    modes = len(widths)
    blocks = core.permute([*range(0, 2 * modes, 2), *range(1, 2 * modes, 2)])
    groups = blocks.shape[:modes]
    blocks = blocks.flatten(0, modes - 1)
    energies = blocks.square().flatten(1).sum(1)
    chosen = energies.argsort(descending=True, stable=True)[:count]
    places = torch.unravel_index(chosen, groups)
    factors = [base[:, place].transpose(0, 1) for base, place in zip(bases, places, strict=True)]
    return [in_shapes_of(form, [blocks[chosen], *factors])]
