"""Tensor-train decomposition of a weight whose channels or features are split into several modes.

Garipov, Podoprikhin, Novikov, Vetrov: Ultimate tensorization: compressing convolutional and FC
layers alike. arXiv:1611.03214 (2016), section 4: first the core of the kernel's places, then one
for each pair of a mode of the inputs and one of the outputs, a TT-matrix. That of a linear layer:
Novikov, Podoprikhin, Osokin, Vetrov: Tensorizing neural networks. NeurIPS 2015.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import ClassVar

import torch
from torch import nn

from rankfold.decompose import Weights, tensor_train
from rankfold.decompose.decomposition import working_precision
from rankfold.decompose.unfolding import mode_product
from rankfold.layers import (
    Convolution,
    TensorizedTrainConvolution,
    TensorNetworkLinear,
    TensorTrainLinear,
    assign_factors,
    channel_modes,
    check_ranks,
    tensorized_limits,
    train_matrix_limits,
)
from rankfold.methods.alternating import Factors, alternate, improve
from rankfold.methods.method import Rank, check_alignment, why_not_spatial
from rankfold.methods.moments import Moments
from rankfold.methods.refit import of_equal_norms
from rankfold.methods.sampled import SampledFamily
from rankfold.methods.tensor_network import (
    in_shapes_of,
    linear_form,
    linear_modes,
    mean_of_mode,
    network_family,
    paired,
    paired_weights,
    why_not_split,
)

# Of the mean eigenvalue of a moment of one mode, added to all where it is a preconditioner.
_DAMPING = 1e-2


@dataclass(frozen=True)
class TensorizedTrain:
    """K ≈ G_0[places] G_1[i_1, o_1] ... G_d[i_d, o_d]: kxk 1→r of each channel, d small products.

    Channels are split into so many `modes`, of about one length; features of a linear layer, which
    has no places, into one more. The one rank bounds all bonds; every number is a candidate, for
    the products are between multiples of the modes. Takes linear layers, and ungrouped convolutions
    with a kernel larger than 1x1, with two channels or more on both sides. It has far fewer
    parameters than other forms and more products than most. The order of a trained layer's channels
    means nothing, so its error is large: it suits training best. More modes save little more and
    lose more.

    TT-SVD in the weight metric, or in that of the moments as far as they are Kronecker products
    over the modes, then alternating least squares in the metric itself.
    """

    name: ClassVar[str] = "tensorized-train"
    makes_chains: ClassVar[bool] = False  # the modes are folded into the batch
    alignment: int = 8
    modes: int = 2

    def __post_init__(self) -> None:
        check_alignment(self.alignment)
        if type(self.modes) is not int or self.modes < 1:
            raise ValueError(f"modes is an integer of at least 1, not {self.modes!r:.40}")

    def why_not(self, layer: nn.Module) -> str | None:
        if type(layer) is nn.Linear:
            return why_not_split(layer)
        return why_not_spatial(layer, channels=2)

    def fit(self, layer: nn.Linear | Convolution, moments: Moments) -> SampledFamily:
        if isinstance(layer, nn.Linear):
            form, full = partial(self._linear, layer), self._limit(layer)
            return network_family(layer, moments, form, _start, range(1, full + 1))
        modes = channel_modes(layer, self.modes)
        limits = tensorized_limits(layer, modes)
        full = max(limits)
        weight = working_precision(layer.weight.detach()).double().flatten(2)
        candidates = [r for r in range(1, full) if _macs(layer, modes, r) < weight.numel()]
        fit = _Fit(layer, weight, modes, moments)
        return SampledFamily(
            layer,
            moments,
            [(rank,) for rank in (*candidates, full)],
            (full,),
            fit.refined,
            fit.drafted,
        )

    def skeleton(self, layer: nn.Linear | Convolution, rank: Rank) -> nn.Module:
        if isinstance(layer, nn.Linear):
            check_ranks(rank, (self._limit(layer),), layer)
            return self._linear(layer, rank)
        modes = channel_modes(layer, self.modes)
        check_ranks(rank, (max(tensorized_limits(layer, modes)),), layer)
        return TensorizedTrainConvolution(layer, modes, rank[0], device="meta")

    def _linear(self, layer: nn.Linear, rank: Rank) -> TensorTrainLinear:
        return linear_form(TensorTrainLinear, layer, rank[0], modes=self.modes + 1)

    def _limit(self, layer: nn.Linear) -> int:
        return max(train_matrix_limits(*linear_modes(layer, self.modes + 1)))


def _start(
    form: TensorNetworkLinear, tensor: torch.Tensor, weights: Weights | None
) -> list[Factors]:
    """TT-SVD."""
    ranks = [form.lengths[term[-1]] for term in form.terms[:-1]]
    train = tensor_train(paired(tensor), ranks, weights=paired_weights(tensor, weights))
    return [in_shapes_of(form, train.cores)]


def _macs(layer: Convolution, modes: Sequence[tuple[int, int]], rank: int) -> int:
    """Of each position of the output; those of the layer itself are its parameters."""
    ranks = [*(min(rank, limit) for limit in tensorized_limits(layer, modes)), 1]
    features = layer.in_channels
    total = features * ranks[0] * math.prod(layer.kernel_size)
    for (before, after), (made, given) in zip(pairwise(ranks), modes, strict=True):
        total += features * before * made * after
        features = features // given * made
    return total


@dataclass(frozen=True, eq=False)
class _Fit:
    """The trains of one kernel."""

    layer: Convolution
    weight: torch.Tensor  # (out, in, places), float64
    modes: Sequence[tuple[int, int]]  # (of outputs, of inputs), pair by pair
    moments: Moments

    @cached_property
    def tensor(self) -> torch.Tensor:
        """(places, o_1 i_1, ..., o_d i_d)."""
        made, given = zip(*self.modes, strict=True)
        split = self.weight.movedim(2, 0).reshape(-1, *made, *given)
        count = len(self.modes)
        pairs = [axis for k in range(count) for axis in (1 + k, 1 + count + k)]
        lengths = [o * i for o, i in self.modes]
        return split.permute(0, *pairs).reshape(-1, *lengths)

    @cached_property
    def weights(self) -> dict[int, torch.Tensor]:
        """By mode of the tensor, what is known of it in the metric: the mean over the others."""
        inputs, gradients = self.moments.inputs, self.moments.gradients
        found: dict[int, torch.Tensor] = {}
        channels = self.moments.of_channels(self.weight.shape[1]).inputs
        if inputs is not None and channels is not inputs:
            found[0] = mean_of_mode(inputs, (self.weight.shape[1], self.weight.shape[2]), 1)
        for place, (made, given) in enumerate(self.modes):
            of_both = []
            for moment, lengths, length in (
                (gradients, [o for o, _ in self.modes], made),
                (channels, [i for _, i in self.modes], given),
            ):
                if moment is None:
                    of_both.append(torch.eye(length).to(self.weight))
                else:
                    of_both.append(mean_of_mode(moment, lengths, place))
            if gradients is not None or channels is not None:
                found[place + 1] = torch.kron(*of_both)
        return found

    def drafted(self, rank: Rank) -> TensorizedTrainConvolution:
        return self._form(rank, refine=False)

    def refined(self, rank: Rank) -> TensorizedTrainConvolution:
        return self._form(rank, refine=True)

    def _form(self, rank: Rank, refine: bool) -> TensorizedTrainConvolution:
        form = TensorizedTrainConvolution(self.layer, self.modes, rank[0], device="meta")
        ranks = [min(rank[0], limit) for limit in tensorized_limits(self.layer, self.modes)]
        cores = self._start(ranks)
        if refine:
            cores = alternate(cores, self._sweep, self._kernel, self.weight, self.moments)
        first, *others = cores
        factors = [first[0].mT]
        for core, (made, given) in zip(others, self.modes, strict=True):
            # (outputs, rank after, inputs, rank before)
            factors.append(core.unflatten(1, (made, given)).permute(1, 3, 2, 0))
        assign_factors(form, of_equal_norms(factors), self.layer)
        return form

    def _start(self, ranks: Sequence[int]) -> Factors:
        """The better one, in the metric, of TT-SVD of the weight and of the weight in it."""
        known = {mode: one for mode, one in self.weights.items() if one.any()}
        trains = [tensor_train(self.tensor, ranks).cores]
        if known:
            trains.append(tensor_train(self.tensor, ranks, weights=known).cores)
        return min(trains, key=self._squared_error)

    def _squared_error(self, cores: Factors) -> float:
        return self.moments.squared_error(self._kernel(*cores) - self.weight)

    def _kernel(self, *cores: torch.Tensor) -> torch.Tensor:
        """(out, in, places)."""
        product = cores[0]
        for core in cores[1:]:
            product = torch.tensordot(product, core, dims=1)
        count = len(self.modes)
        split = product.reshape(-1, *(length for pair in self.modes for length in pair))
        order = [*range(1, 2 * count, 2), *range(2, 2 * count + 1, 2), 0]
        return split.permute(order).reshape(self.weight.shape)

    def _sweep(self, *cores: torch.Tensor) -> Factors:
        """From the last core to the first, those before with orthonormal columns, and behind rows.

        So each problem is as well conditioned as the metric is.
        """
        found = list(cores)
        for k in range(len(found) - 1):
            left, right = torch.linalg.qr(found[k].flatten(0, 1))
            found[k] = left.reshape(*found[k].shape[:2], -1)
            found[k + 1] = torch.tensordot(right, found[k + 1], dims=1)
        for k in reversed(range(len(found))):
            kernel = partial(self._with_core, found, k)
            solve = partial(self._precondition, k)
            found[k] = improve(found[k], kernel, self.weight, self.moments, solve)
            if k > 0:
                right, left = torch.linalg.qr(found[k].flatten(1).mT)
                found[k] = right.mT.reshape(-1, *found[k].shape[1:])
                found[k - 1] = torch.tensordot(found[k - 1], left.mT, dims=1)
        return tuple(found)

    def _with_core(
        self, cores: Sequence[torch.Tensor], place: int, core: torch.Tensor
    ) -> torch.Tensor:
        return self._kernel(*cores[:place], core, *cores[place + 1 :])

    def _precondition(self, place: int, residual: torch.Tensor) -> torch.Tensor:
        if place not in self._inverses:
            return residual
        return mode_product(residual, self._inverses[place], 1)

    @cached_property
    def _inverses(self) -> dict[int, torch.Tensor]:
        found = {}
        for mode, moment in self.weights.items():
            ridge = _DAMPING * moment.diagonal().mean()
            if ridge > 0:
                identity = torch.eye(len(moment)).to(moment)
                found[mode] = torch.linalg.inv(moment + ridge * identity)
        return found
