"""Tensor-ring decomposition of a convolution's kernel: of its inputs, its places, its outputs.

Of a linear layer's weight: of the modes that its outputs and inputs are split into.

Wang, Sun, Eriksson, Wang, Aggarwal: Wide compression: tensor ring nets. CVPR 2018, section 3. The
start is TR-SVD, and alternating least squares follow, as in Zhao, Zhou, Xie, Zhang, Cichocki:
Tensor ring decomposition. arXiv:1606.05535 (2016).
"""

from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import ClassVar

import torch
from torch import nn

from rankfold.decompose import Weights, tensor_ring, tensor_train
from rankfold.decompose.matrix import leading_eigenvectors
from rankfold.decompose.unfolding import gram
from rankfold.errors import RankError
from rankfold.layers import (
    Convolution,
    TensorNetworkLinear,
    TensorRingConvolution,
    TensorRingLinear,
    assign_factors,
    check_ranks,
    modes_of,
    ring_limits,
    train_limits_of,
)
from rankfold.methods.alternating import Factors
from rankfold.methods.method import Rank, aligned_ranks, check_alignment, why_not_spatial
from rankfold.methods.moments import Moments
from rankfold.methods.refit import improved_last_factor, of_equal_norms
from rankfold.methods.sampled import SampledFamily
from rankfold.methods.tensor_network import (
    linear_form,
    network_family,
    why_not_split,
)
from rankfold.methods.three_factors import ThreeFactors, in_turn
from rankfold.methods.whitened import WhitenedKernel

# Sweeps of alternating least squares of a fit whose loss is an estimate, and of the one built.
_DRAFT, _SWEEPS = 6, 50


@dataclass(frozen=True)
class TensorRing:
    """K ≈ Σ_s in[s, r] core[r, q] out[q, s]: 1x1 in→s r, kxk r→q of each of s slices, 1x1 s q→out.

    Tucker-2 with one core for several pairs of maps of the channels, or block terms with one core
    for all blocks: fewer parameters at the same error, more products for the same parameters. There
    are so many `slices`, on layers of few channels as many as `alignment` goes into those; ranks
    are (q, r). Takes ungrouped convolutions with a kernel larger than 1x1 and channels for at least
    two slices. Of linear layers, whose features are split into so many `modes` on both sides, the
    slices are the rank of the bond between outputs and inputs, and the one rank bounds all others.
    Fits find local optima.
    """

    name: ClassVar[str] = "tensor-ring"
    makes_chains: ClassVar[bool] = False  # the slices are folded into the batch
    alignment: int = 8
    slices: int = 4  # of 2 to 8 about the best at any number of parameters
    modes: int = 3

    def __post_init__(self) -> None:
        check_alignment(self.alignment)
        for name in ("slices", "modes"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is an integer of at least 1, not {value!r:.40}")

    def why_not(self, layer: nn.Module) -> str | None:
        if type(layer) is nn.Linear:
            return why_not_split(layer)
        return why_not_spatial(layer, channels=2 * self.alignment)

    def fit(self, layer: nn.Linear | Convolution, moments: Moments) -> SampledFamily:
        if isinstance(layer, nn.Linear):
            candidates = list(aligned_ranks(self._limit(layer), self.alignment))
            form = partial(self._linear, layer)
            return network_family(layer, moments, form, _start_of_modes, candidates)
        slices = self._slices(layer)
        fit = _Fit(layer, moments, slices)
        limits = layer.out_channels, layer.in_channels
        axes = []
        for limit in limits:
            others = slices * self.alignment * (sum(limits) - limit)
            saving = (fit.tensor.numel() - 1 - others) // (
                slices * limit + self.alignment * fit.tensor.shape[2]
            )
            ranks = aligned_ranks(limit, self.alignment)
            axes.append([rank for rank in ranks if rank <= saving or rank == limit])
        return SampledFamily(layer, moments, list(product(*axes)), limits, fit.refined, fit.drafted)

    def skeleton(self, layer: nn.Linear | Convolution, rank: Rank) -> nn.Module:
        if isinstance(layer, nn.Linear):
            check_ranks(rank, (self._limit(layer),), layer)
            return self._linear(layer, rank)
        check_ranks(rank, (layer.out_channels, layer.in_channels), layer)
        return TensorRingConvolution(layer, (self._slices(layer), *rank), device="meta")

    def _limit(self, layer: nn.Linear) -> int:
        outputs, inputs = (modes_of(length, self.modes) for length in layer.weight.shape)
        return max(train_limits_of((*outputs, *inputs)))

    def _linear(self, layer: nn.Linear, rank: Rank) -> TensorRingLinear:
        outputs, inputs = (modes_of(length, self.modes) for length in layer.weight.shape)
        first = min(self.slices, *layer.weight.shape)
        others = (min(rank[0], limit) for limit in ring_limits(inputs, outputs, first)[1:])
        return linear_form(TensorRingLinear, layer, (first, *others), modes=self.modes)

    def _slices(self, layer: Convolution) -> int:
        return min(self.slices, min(layer.out_channels, layer.in_channels) // self.alignment)


@dataclass(frozen=True)
class _Ring(ThreeFactors):
    """Σ_s outputs[:, s] core inputs[:, s]ᵀ: one core for all slices."""

    def features(self) -> torch.Tensor:
        return torch.einsum("qrp,isr->sqip", self.cores, self.inputs).flatten(0, 1)

    def onto_inputs(self, half: torch.Tensor) -> torch.Tensor:
        return torch.einsum("sqip,qrp->isr", half, self.cores)

    def onto_cores(self, half: torch.Tensor) -> torch.Tensor:
        return torch.einsum("sqip,isr->qrp", half, self.inputs)

    def with_outputs(self, outputs: torch.Tensor) -> "_Ring":
        """Orthonormal columns (out x slices)."""
        turned, mixing = torch.linalg.qr(outputs.flatten(0, 1))
        cores = torch.einsum("tq,qrp->trp", mixing, self.cores)
        return replace(self, outputs=turned.reshape(outputs.shape), cores=cores)


@dataclass(frozen=True, eq=False)
class _Fit(WhitenedKernel):
    """The ring of one kernel: in the metric of channels, then the last factor in patches'."""

    slices: int

    def drafted(self, rank: Rank) -> TensorRingConvolution:
        return self._form(rank, _DRAFT)

    def refined(self, rank: Rank) -> TensorRingConvolution:
        return self._form(rank, _SWEEPS)

    def _form(self, rank: Rank, sweeps: int) -> TensorRingConvolution:
        form = TensorRingConvolution(self.layer, (self.slices, *rank), device="meta")
        found = in_turn(self.whitened, _start(self.whitened, self.slices, *rank), sweeps)
        found = _Ring(
            self.whitening.restore(found.outputs.flatten(1), 0).reshape(found.outputs.shape),
            self.whitening.restore(found.inputs.flatten(1), 1).reshape(found.inputs.shape),
            found.cores,
        )
        last = improved_last_factor(
            self.tensor, found.outputs.flatten(1), found.features(), self.moments
        )
        factors = of_equal_norms([found.inputs.flatten(1).mT, found.cores, last])
        assign_factors(form, factors, self.layer)
        return form


def _start_of_modes(
    form: TensorNetworkLinear, tensor: torch.Tensor, weights: Weights | None
) -> list[Factors]:
    """A ring, where there is one of these ranks; and a train, of which one slice is not zero."""
    ranks = [form.lengths[term[0]] for term in form.terms]
    train = tensor_train(tensor, ranks[1:], weights=weights)
    embedded = []
    for core, factor in zip(train.cores, form.factors, strict=True):
        larger = tensor.new_zeros(factor.shape)
        larger[: core.shape[0], :, : core.shape[2]] = core
        embedded.append(larger)
    try:
        ring = tensor_ring(tensor, ranks, iterations=_DRAFT, weights=weights)
    except RankError:
        return [tuple(embedded)]
    return [ring.cores, tuple(embedded)]


def _start(tensor: torch.Tensor, slices: int, rank_out: int, rank_in: int) -> _Ring:
    """The better one of TR-SVD from the inputs on and from the outputs on.

    Both are exact where a single slice with these ranks is.
    """
    turned = tensor.transpose(0, 1)
    rings = [
        _tr_svd(tensor, slices, rank_out, rank_in),
        _tr_svd(turned, slices, rank_in, rank_out).transposed(),
    ]
    return min(rings, key=lambda ring: (tensor - ring.to_tensor()).square().sum().item())


def _tr_svd(tensor: torch.Tensor, slices: int, rank_out: int, rank_in: int) -> _Ring:
    """The leading vectors of the inputs, so many to each slice, and the best of what remains.

    Where there are fewer, the last slices have none: they are zero.
    """
    unfolding = tensor.transpose(0, 1).flatten(1)
    vectors = leading_eigenvectors(gram(unfolding))[1][:, : slices * rank_in]
    missing = slices * rank_in - vectors.shape[1]
    inputs = nn.functional.pad(vectors, (0, missing)).unflatten(1, (slices, rank_in))
    used = -(-vectors.shape[1] // rank_in)
    rest = torch.einsum("oip,isr->rpos", tensor, inputs[:, :used])
    matrix = rest.flatten(2).flatten(0, 1)
    left, right = _truncated(matrix, rank_out)
    cores = left.reshape(rank_in, -1, rank_out).permute(2, 0, 1)
    outputs = right.mT.unflatten(0, (-1, used)).transpose(1, 2)
    outputs = nn.functional.pad(outputs, (0, slices - used)).transpose(1, 2)
    return _Ring(outputs, inputs, cores)


def _truncated(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best left @ right of a rank, zero beyond that of the matrix; the shorter is orthonormal.

    From the Gram matrix of the shorter side: at full rank nothing is lost to its rounding.
    """
    if matrix.shape[0] > matrix.shape[1]:
        right, left = _truncated(matrix.mT, rank)
        return left.mT, right.mT
    vectors = leading_eigenvectors(gram(matrix))[1][:, :rank]
    padded = nn.functional.pad(vectors, (0, rank - vectors.shape[1]))
    return padded, padded.mT @ matrix
