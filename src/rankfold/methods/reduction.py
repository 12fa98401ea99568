"""Grouped and transposed convolutions for every method that makes chains of convolutions.

And linear layers with a transposed weight for every method that takes linear layers: they are those
linear layers.

Methods see plain convolutions alone. A grouped convolution is one plain convolution for the
channels of each group; all of them get the same rank, so that they stay one chain of grouped links.
A transposed convolution of inputs to outputs is the adjoint of the convolution of outputs to inputs
with the same weight: the moments of inputs and gradients change places, and the chain that the
method finds is turned round.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from rankfold.layers import (
    CONVOLUTIONS,
    TRANSPOSED,
    Convolution,
    GroupedConvolution,
    Transposed,
    TransposedConvolution,
    adjoint_weights,
    as_linear,
    assign_factors,
    is_transposed_linear,
)
from rankfold.methods.method import Family, Method, Rank, Spectrum
from rankfold.methods.moments import Moments


def why_not(method: Method, layer: nn.Module) -> str | None:
    """Why the method cannot take this layer, grouped or transposed ones included, or None."""
    if not _is_reduced(layer):
        return method.why_not(_as_methods_see(layer))
    convolution = cast("Convolution | Transposed", layer)
    groups = convolution.groups
    kind = "transposed convolution" if type(layer) in TRANSPOSED else "grouped convolution"
    if groups > 1:
        kind += f", groups={groups}"
        if groups in (convolution.in_channels, convolution.out_channels):
            return f"{kind}: depthwise, with a single channel in a group"
    if not getattr(method, "makes_chains", True):
        return f"{kind}: {method.name} makes no chain of convolutions"
    reason = _aligned(method, layer).why_not(_plain(layer)[0])
    return None if reason is None else f"{kind}: {reason}"


def fit(method: Method, layer: nn.Module, moments: Moments) -> Family:
    """What the method offers for a layer for which `why_not` is None, in a metric.

    The moments of a grouped convolution are stacks of those of its groups: (groups, n, n). Raises
    TensorError for moments that hold NaN or infinity.
    """
    moments.check_finite()
    if not _is_reduced(layer):
        known = (
            moments if getattr(method, "knows_diagonals", False) else moments.without_diagonals()
        )
        return method.fit(_as_methods_see(layer), known)
    aligned, plain = _aligned(method, layer), _plain(layer)
    metrics = _moments_of_plain(layer, plain, moments)
    families = [aligned.fit(one, metric) for one, metric in zip(plain, metrics, strict=True)]
    return ReducedFamily(cast("Convolution | Transposed", layer), families)


def skeleton(method: Method, layer: nn.Module, rank: Rank) -> nn.Module:
    """The form at this rank on the meta device; raises RankError."""
    if not _is_reduced(layer):
        return method.skeleton(_as_methods_see(layer), rank)
    chain = _aligned(method, layer).skeleton(_plain(layer)[0], rank)
    return _whole_form(layer, cast(nn.Sequential, chain))


@dataclass(frozen=True)
class ReducedFamily:
    """The families of the plain convolutions within a layer, all at the same rank."""

    layer: Convolution | Transposed
    families: Sequence[Family]  # of each group

    @property
    def spectra(self) -> Sequence[Spectrum]:
        """Root mean squares over the groups: a rank keeps the same share of their energy."""
        return [
            Spectrum(
                torch.stack([one.singular_values for one in same]).square().mean(0).sqrt(),
                same[0].shape,
            )
            for same in zip(*(family.spectra for family in self.families), strict=True)
        ]

    def ranks(self) -> Sequence[Rank]:
        """Those of the group that has the greatest: a group may have less to keep than others."""
        return max((family.ranks() for family in self.families), key=max)

    def loss(self, rank: Rank) -> float:
        return sum(family.loss(rank) for family in self.families)

    def build(self, rank: Rank) -> nn.Sequential:
        chains = [cast(nn.Sequential, family.build(rank)) for family in self.families]
        links = zip(*(cast("list[Convolution]", list(chain)) for chain in chains), strict=True)
        weights = [torch.cat([one.weight.detach() for one in same]) for same in links]
        form = _whole_form(self.layer, chains[0])
        if isinstance(form, TransposedConvolution):
            weights = adjoint_weights(weights, form)
        assign_factors(form, weights, self.layer)
        return form


def _as_methods_see(layer: nn.Module) -> nn.Module:
    return as_linear(layer) if is_transposed_linear(layer) else layer


def _is_reduced(layer: Any) -> bool:
    """Whether a layer is a convolution that methods do not see as it is."""
    kind = type(layer)
    return kind in TRANSPOSED or (kind in CONVOLUTIONS and layer.groups > 1)


def _aligned(method: Method, layer: Any) -> Method:
    """The method with ranks that are aligned when those of all groups are taken together."""
    alignment = max(1, cast(Any, method).alignment // layer.groups)
    return replace(cast(Any, method), alignment=alignment)


def _plain(layer: Any) -> list[Convolution]:
    """The plain convolutions, without a bias, that the layer consists of or is the adjoint of."""
    kind = CONVOLUTIONS[len(layer.kernel_size) - 1]
    found = []
    for weight in layer.weight.detach().tensor_split(layer.groups):
        one = cast(Any, kind)(
            weight.shape[1],
            weight.shape[0],
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            bias=False,
            padding_mode=layer.padding_mode,
            device="meta",
            dtype=weight.dtype,
        )
        one.weight = nn.Parameter(weight, layer.weight.requires_grad)
        found.append(one.train(layer.training))
    return found


def _moments_of_plain(layer: Any, plain: Sequence[Convolution], moments: Moments) -> list[Moments]:
    """Those of each plain convolution, in the unit of the whole layer's."""
    inputs, gradients = (
        [None] * layer.groups if moment is None else moment.reshape(-1, *moment.shape[-2:])
        for moment in (moments.inputs, moments.gradients)
    )
    if isinstance(layer, TRANSPOSED):
        inputs, gradients = gradients, inputs
    found = [Moments(*both) for both in zip(inputs, gradients, strict=True)]
    scale = moments.scale
    if scale is None:
        errors = (m.squared_error(one.weight.detach()) for m, one in zip(found, plain, strict=True))
        whole = sum(errors)
        scale = 1 / whole if whole > 0 else 0.0
    return [replace(one, scale=scale) for one in found]


def _whole_form(layer: Any, chain: nn.Sequential) -> nn.Sequential:
    """The form of a layer, on the meta device, from the chain of one of its plain convolutions."""
    if isinstance(layer, CONVOLUTIONS):
        return GroupedConvolution(chain, layer.groups, bias=layer.bias is not None)
    side_by_side = chain if layer.groups == 1 else GroupedConvolution(chain, layer.groups)
    return TransposedConvolution(side_by_side, layer)
