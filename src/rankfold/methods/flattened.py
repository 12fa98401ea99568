"""Flattened convolutions: every filter the product of a vector of channels and one per axis.

Jin, Dundar, Culurciello: Flattened convolutional neural networks for feedforward acceleration. ICLR
2015 (workshop). A CP decomposition with one term for each output: of a trained layer a coarse
approximation, which training has to follow.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from rankfold.decompose.decomposition import working_precision
from rankfold.layers import (
    Convolution,
    FlattenedConvolution,
    assign_factors,
    axis_groups,
    check_ranks,
)
from rankfold.methods.alternating import Factors, alternate, improve
from rankfold.methods.method import Rank, Spectrum, check_alignment, why_not_spatial
from rankfold.methods.moments import Moments
from rankfold.methods.refit import solve

_ITERATIONS = 20


@dataclass(frozen=True)
class Flattened:
    """K[o] ≈ lateral[o] ⊗ vertical[o] ⊗ horizontal[o]: 1x1 in→out, depthwise kx1, depthwise 1xk.

    Takes ungrouped convolutions with a kernel larger than 1x1. There is one rank, (1,).
    """

    name: ClassVar[str] = "flattened"
    alignment: int = 8

    def __post_init__(self) -> None:
        check_alignment(self.alignment)

    def why_not(self, layer: nn.Module) -> str | None:
        return why_not_spatial(layer)

    def fit(self, layer: Convolution, moments: Moments) -> "FlattenedFamily":
        weight = working_precision(layer.weight.detach()).double()
        lengths = [
            torch.Size(layer.kernel_size[axis] for axis in axes).numel()
            for axes in axis_groups(layer)
        ]
        weight = weight.reshape(*weight.shape[:2], *lengths)
        factors = _refined(weight, _start(weight, moments), moments)
        lost = moments.squared_error(_kernel_of(*factors) - weight)
        return FlattenedFamily(layer, factors, moments.loss_of(lost, weight).item())

    def skeleton(self, layer: Convolution, rank: Rank) -> nn.Sequential:
        check_ranks(rank, (1,), layer)
        return FlattenedConvolution(layer, device="meta")


@dataclass(frozen=True)
class FlattenedFamily:
    """The one flattened layer."""

    layer: Convolution
    factors: Factors = field(repr=False)  # (out, in), then (out, length) for each axis; float64
    only_loss: float

    @property
    def spectra(self) -> Sequence[Spectrum]:
        return ()

    def ranks(self) -> Sequence[Rank]:
        return [(1,)]

    def loss(self, rank: Rank) -> float:
        check_ranks(rank, (1,), self.layer)
        return self.only_loss

    def build(self, rank: Rank) -> nn.Sequential:
        check_ranks(rank, (1,), self.layer)
        form = FlattenedConvolution(self.layer, device="meta")
        assign_factors(form, self.factors, self.layer)
        return form


def _kernel_of(*factors: torch.Tensor) -> torch.Tensor:
    """The kernel (out, in, *lengths) of factors (out, in) and (out, length)."""
    product, *others = factors
    for factor in others:
        product = product[..., None] * factor.reshape(len(factor), *(1,) * (product.dim() - 1), -1)
    return product


def _start(weight: torch.Tensor, moments: Moments) -> Factors:
    """The best product for each filter by itself, in the metric of the input channels.

    By the power method for tensors, from the leading singular vectors along each axis; the vectors
    of the axes are of unit length.
    """
    channels = moments.of_channels(weight.shape[1])
    tensor, inverse = weight, None
    if channels.input_roots is not None:
        root, inverse = channels.input_roots
        tensor = torch.einsum("oi...,ij->oj...", weight, root)
    axes = []
    for axis in range(2, tensor.dim()):
        unfolding = tensor.movedim(axis, 1).flatten(2)
        axes.append(torch.linalg.eigh(unfolding @ unfolding.mT).eigenvectors[..., -1])
    for _ in range(_ITERATIONS):
        lateral = nn.functional.normalize(_along(0, tensor, [None, *axes]), dim=1)
        for axis in range(len(axes)):
            seen = _along(axis + 1, tensor, [lateral, *axes])
            length = seen.norm(dim=1, keepdim=True)
            axes[axis] = torch.where(length > 0, seen / length, axes[axis])
    lateral = _along(0, tensor, [None, *axes])
    return lateral if inverse is None else lateral @ inverse, *axes


def _along(kept: int, tensor: torch.Tensor, vectors: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """Each filter of (out, ...) multiplied by its vectors in all modes but one: (out, length)."""
    for mode in reversed(range(len(vectors))):
        vector = vectors[mode]
        if mode != kept and vector is not None:
            tensor = torch.einsum("o...k,ok->o...", tensor.movedim(mode + 1, -1), vector)
    return tensor


def _refined(weight: torch.Tensor, factors: Factors, moments: Moments) -> Factors:
    """In the metric itself, all filters together, of the same norms along each axis."""
    channels = moments.of_channels(weight.shape[1]).inputs
    gradients = moments.gradients
    sizes = weight.new_ones(len(weight)) if gradients is None else gradients.diagonal()

    def precondition(place: int, given: Factors, residual: torch.Tensor) -> torch.Tensor:
        size = sizes
        for other, factor in enumerate(given):
            if other != place:
                size = size * factor.square().sum(1)
        residual = residual / torch.where(size > 0, size, 1)[:, None]
        return solve(channels, residual) if place == 0 and channels is not None else residual

    def with_factor(place: int, given: Factors, factor: torch.Tensor) -> torch.Tensor:
        return _kernel_of(*given[:place], factor, *given[place + 1 :])

    def sweep(*given: torch.Tensor) -> Factors:
        for place, factor in enumerate(given):
            better = improve(
                factor,
                partial(with_factor, place, given),
                weight,
                moments,
                partial(precondition, place, given),
            )
            given = (*given[:place], better, *given[place + 1 :])
        return given

    return _balanced(alternate(factors, sweep, _kernel_of, weight, moments))


def _balanced(factors: Factors) -> Factors:
    norms = torch.stack([factor.norm(dim=1) for factor in factors])
    mean = norms.prod(0) ** (1 / len(factors))
    ratios = torch.where(mean > 0, mean / torch.where(norms > 0, norms, 1), 1)
    return tuple(factor * ratio[:, None] for factor, ratio in zip(factors, ratios, strict=True))
