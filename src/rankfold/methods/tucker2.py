"""Tucker-2 decomposition of a convolution's channel modes.

Kim, Park, Yoo, Choi, Yang, Shin: Compression of deep convolutional neural networks for fast and low
power mobile applications. ICLR 2016.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from rankfold.decompose import Tucker, Weights, tucker
from rankfold.decompose.matrix import leading_eigenvectors
from rankfold.decompose.unfolding import mode_product
from rankfold.layers import (
    Convolution,
    TuckerConvolution,
    assign_factors,
    check_ranks,
)
from rankfold.methods.method import Rank, Spectrum, aligned_ranks, check_alignment, why_not_spatial
from rankfold.methods.moments import Moments

CHANNEL_MODES = (0, 1)  # of a weight (out, in, *kernel)
# Shares of the full rank of the inputs at which the error in the metric of patches is computed.
_PROBES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)
# Of the mean eigenvalue of the inputs' moment, added to all: what no input shows stays as it is.
_LEAST = 1e-10


@dataclass(frozen=True)
class Tucker2:
    """K ≈ core x_out U_out x_in U_in: 1x1 in→r_in, kxk r_in→r_out, 1x1 r_out→out.

    Takes ungrouped convolutions with a kernel larger than 1x1 and at least two aligned ranks of
    input channels. Ranks are (r_out, r_in).
    """

    name: ClassVar[str] = "tucker2"
    alignment: int = 8

    def __post_init__(self) -> None:
        check_alignment(self.alignment)

    def why_not(self, layer: nn.Module) -> str | None:
        if (reason := why_not_spatial(layer)) is not None:
            return reason
        inputs = layer.get_parameter("weight").shape[1]
        if inputs < 2 * self.alignment:
            return f"only {inputs} input channels to reduce: svd serves it"
        return None

    def fit(self, layer: Convolution, moments: Moments) -> "Tucker2Family":
        weight = layer.weight.detach()
        moments = moments.damped(_LEAST)
        weights = _weights(moments.of_channels(layer.in_channels))
        hosvd = tucker(weight, modes=CHANNEL_MODES, weights=weights)
        return Tucker2Family(layer, hosvd, moments, self.alignment)

    def skeleton(self, layer: Convolution, rank: Rank) -> nn.Sequential:
        return TuckerConvolution(layer, rank, device="meta")


@dataclass(frozen=True)
class Tucker2Family:
    """All truncations of one HOSVD; the one that is built is refined by HOOI.

    In the metric of the channels; where the moment of whole patches is known, all but the factor of
    the inputs are then the best ones in its metric, and the losses are corrected by it.
    """

    layer: Convolution
    hosvd: Tucker  # at full rank
    moments: Moments
    alignment: int

    @property
    def spectra(self) -> Sequence[Spectrum]:
        core = self.hosvd.core.double()
        spectra = []
        for mode in CHANNEL_MODES:
            # The core of an HOSVD is all-orthogonal: its slices' norms are the singular values.
            norms = torch.linalg.vector_norm(core.movedim(mode, 0).flatten(1), dim=1)
            sides = (core.shape[mode], core.numel() // core.shape[mode])
            spectra.append(Spectrum(norms.sort(descending=True).values[: min(sides)], sides))
        return spectra

    def ranks(self) -> Sequence[Rank]:
        return list(product(*(aligned_ranks(limit, self.alignment) for limit in self.hosvd.ranks)))

    @cached_property
    def _losses(self) -> torch.Tensor:
        """Of each pair of ranks: (out, in), ending in 0."""
        energy = self.hosvd.core.double().square().flatten(2).sum(2)
        kept = energy.cumsum(0).cumsum(1)
        lost = (kept[-1, -1] - kept).clamp_min(0)
        if self.moments.of_channels(self.layer.in_channels) is not self.moments:
            lost = self._corrected(lost)
        return self.moments.loss_of(lost, self.layer.weight.detach())

    def _corrected(self, lost: torch.Tensor) -> torch.Tensor:
        """Squared errors (out, in) in the metric of the channels as ones in that of patches.

        Exact for outputs alone, and for inputs alone at a few ranks, with interpolated ratios in
        between; of both, the share that the inputs add is scaled by the same ratio.
        """
        weight = self.layer.weight.detach()
        responses = self.moments.times_inputs(weight)
        outputs = _output_tail(weight, responses, self.moments)
        ratios = self._input_ratios(lost[-1], responses)
        by_inputs = (lost - lost[:, -1:]).clamp_min(0) * ratios
        total = outputs[:, None] + by_inputs
        return total.cummin(1).values.cummin(0).values

    def _input_ratios(self, marginal: torch.Tensor, responses: torch.Tensor) -> torch.Tensor:
        """Error in the metric of patches over that of the channels, at each rank of the inputs."""
        inputs = self.hosvd.factors[1]
        full = inputs.shape[1]
        probes = sorted({max(1, round(full * share)) for share in _PROBES})
        exact = _input_errors(self.layer.weight.detach(), responses, inputs, self.moments, probes)
        known = marginal[[rank - 1 for rank in probes]].cpu().numpy()
        ratio = np.divide(exact, known, out=np.ones_like(known), where=known > 0)
        every = np.interp(np.arange(1, full + 1), probes, ratio)
        return torch.from_numpy(every).to(marginal)

    def loss(self, rank: Rank) -> float:
        """That of the truncated HOSVD; `build` goes on to refine it."""
        check_ranks(rank, self.hosvd.ranks, self.layer)
        return self._losses[rank[0] - 1, rank[1] - 1].item()

    def build(self, rank: Rank) -> nn.Sequential:
        form = TuckerConvolution(self.layer, rank, device="meta")
        weight = self.layer.weight.detach()
        channels = self.moments.of_channels(self.layer.in_channels)
        fitted = tucker(weight, rank, CHANNEL_MODES, weights=_weights(channels))
        outputs, inputs = fitted.factors
        core = fitted.core
        if channels is not self.moments:
            outputs, core = _best_outputs_and_core(weight, inputs.double(), rank[0], self.moments)
        assign_factors(form, (inputs.mT, core, outputs), self.layer)
        return form


def _weights(channels: Moments) -> Weights:
    moments = zip(CHANNEL_MODES, (channels.gradients, channels.inputs), strict=True)
    return {mode: moment for mode, moment in moments if moment is not None}


def _output_tail(weight: torch.Tensor, responses: torch.Tensor, moments: Moments) -> torch.Tensor:
    """Least squared error at each rank of the outputs, the inputs kept: (out,)."""
    moment = responses @ weight.double().flatten(1).mT
    if moments.output_roots is not None:
        root, _ = moments.output_roots
        moment = root @ moment @ root
    squares = leading_eigenvectors(moment)[0]
    beyond = squares.flip(0).cumsum(0).flip(0)
    return torch.cat([beyond[1:], beyond.new_zeros(1)])


def _reduced(
    responses: torch.Tensor, inputs: torch.Tensor, moments: Moments
) -> tuple[torch.Tensor, torch.Tensor]:
    """The moment of reduced patches, and the responses W A, (out, in * places), in them.

    With Z the patches' map by the factor of the inputs (in, rank): Z A Zᵀ, (rank * places)
    squared, and W A Zᵀ, (out, rank * places).
    """
    assert moments.inputs is not None
    channels, rank = inputs.shape
    places = len(moments.inputs) // channels
    patches = moments.inputs.reshape(channels, places, channels, places)
    half = mode_product(patches, inputs.mT, 0)
    reduced = mode_product(half, inputs.mT, 2).reshape(rank * places, -1)
    reduced = (reduced + reduced.mT) / 2
    by_channel = responses.reshape(-1, channels, places)
    return reduced, mode_product(by_channel, inputs.mT, 1).flatten(1)


def _best_outputs_and_core(
    weight: torch.Tensor, inputs: torch.Tensor, rank: int, moments: Moments
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factor of the outputs and the core that are best in the metric of patches.

    For given inputs this is a matrix problem with a closed form: the weight on reduced patches by
    its normal equations, and of that the truncated SVD in the metric.
    """
    reduced, responses = _reduced(moments.times_inputs(weight), inputs, moments)
    # From the projection in the metric of the channels on: what no patch shows stays as it is.
    channels = moments.of_channels(len(inputs)).inputs
    assert channels is not None
    start = mode_product(weight.double().flatten(2), (channels @ inputs).mT, 1).flatten(1)
    whole = start + _solve(reduced, responses - start @ reduced)
    identity = torch.eye(len(weight), dtype=whole.dtype, device=whole.device)
    root, inverse = moments.output_roots or (identity, identity)
    energy = root @ whole @ responses.mT @ root
    vectors = leading_eigenvectors((energy + energy.mT) / 2)[1][:, :rank]
    core = vectors.mT @ root @ whole
    return inverse @ vectors, core.reshape(rank, inputs.shape[1], *weight.shape[2:])


def _solve(reduced: torch.Tensor, responses: torch.Tensor) -> torch.Tensor:
    """The x of x @ reduced = responses."""
    lower, failed = torch.linalg.cholesky_ex(reduced)
    if failed:
        return responses @ torch.linalg.pinv(reduced, hermitian=True)
    return torch.cholesky_solve(responses.mT, lower).mT


def _input_errors(
    weight: torch.Tensor,
    responses: torch.Tensor,
    inputs: torch.Tensor,
    moments: Moments,
    ranks: Sequence[int],
) -> np.ndarray:
    """Squared error in the metric of patches with the leading columns of the inputs' factor."""
    whole = (moments.times_gradients(weight) * responses).sum().item()
    errors = []
    for rank in ranks:
        reduced, fewer = _reduced(responses, inputs[:, :rank].double(), moments)
        kept = _solve(reduced, fewer) * moments.times_gradients(fewer)
        errors.append(max(whole - kept.sum().item(), 0.0))
    return np.array(errors)
