"""The best mixture of filters that are given for every input channel, in any metric."""

import torch

from rankfold.methods.moments import WEIGHT_METRIC, Moments
from rankfold.methods.refit import added_by_each, solve, tail


def best_mixture(
    weight: torch.Tensor,
    filters: torch.Tensor,
    moments: Moments,
    start: torch.Tensor | None = None,
) -> torch.Tensor:
    """The a, (out, filters, in), of the least error of Σ_m a[o, m, i] filters[m, i].

    For a weight (out, in, places) and filters (filters, in, places), or (filters, 1, places) for
    the same on all channels, all float64. What no input shows stays as it is in `start`, or as it
    is best for the weight itself.
    """
    if _are_apart(filters, weight, moments):
        moments = WEIGHT_METRIC
    if start is None:
        nothing = weight.new_zeros(len(weight), len(filters), weight.shape[1])
        start = best_mixture(weight, filters, WEIGHT_METRIC, nothing)
    solved = solve(*_normal_equations(weight - mixed(filters, start), filters, moments))
    if moments.inputs is None:
        return start + solved.movedim(0, 2)
    return start + solved.reshape(start.shape)


def errors_by_filter(weight: torch.Tensor, filters: torch.Tensor, moments: Moments) -> torch.Tensor:
    """The squared errors with the first 1, 2, ... filters of every channel: (filters,)."""
    if _are_apart(filters, weight, moments):
        shared = filters[:, 0]
        added = added_by_each(shared @ shared.mT, weight.flatten(0, 1) @ shared.mT, WEIGHT_METRIC)
        squares = [moments.squared_error(one.reshape(weight.shape[:2])) for one in added]
        return tail(weight.new_tensor(squares))
    added = added_by_each(*_normal_equations(weight, filters, moments), moments)
    kept = added.square().sum(-1)  # (channels, filters), or all features in one row
    return tail(kept.reshape(len(kept), len(filters), -1).sum((0, 2)))


def mixed(filters: torch.Tensor, mixture: torch.Tensor) -> torch.Tensor:
    """The weight (out, in, places)."""
    return torch.einsum("omi,mip->oip", mixture, filters.expand(-1, mixture.shape[2], -1))


def _are_apart(filters: torch.Tensor, weight: torch.Tensor, moments: Moments) -> bool:
    """Whether the best mixture of each place is the same in the metric as in that of the weight.

    Filters that all channels share span a space of kernels, the nearest of which to a kernel does
    not depend on a metric that is the same at all its places.
    """
    return filters.shape[1] == 1 and moments.of_channels(weight.shape[1]) is moments


def _normal_equations(
    weight: torch.Tensor, filters: torch.Tensor, moments: Moments
) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of the mixture: (groups, features, features) and (groups, out, features).

    Where channels are not correlated each is a group, its filters the features; otherwise all
    features are one group, (filters, in) flattened.
    """
    _, inputs, places = weight.shape
    filters = filters.expand(-1, inputs, -1)
    if moments.inputs is None:
        by_channel = filters.movedim(1, 0)
        return by_channel @ by_channel.mT, weight.movedim(1, 0) @ by_channel.mT
    if len(moments.inputs) == inputs:
        seen = torch.einsum("mip,ij->mijp", filters, moments.inputs)
    else:
        patches = moments.inputs.reshape(inputs, places, -1)
        seen = torch.einsum("mip,ipn->min", filters, patches)
    seen = seen.reshape(-1, inputs, places)  # the features with all of the patch
    gram = torch.einsum("xip,mip->xmi", seen, filters).reshape(len(seen), -1)
    crossed = weight.flatten(1) @ seen.flatten(1).mT
    return (gram + gram.mT)[None] / 2, crossed[None]
