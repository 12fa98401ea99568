"""Positions of a layer: what reaches it in one network, what it gives in another."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from rankfold.batches import Forward, all_finite, run_or_explain, running
from rankfold.errors import CalibrationError
from rankfold.layers import has_features_last

# Positions of one layer that count at most: so many times the features, and at least so many.
_TIMES_FEATURES, _POSITIONS = 20, 8192


def run_watched(
    model: nn.Module,
    batch: Any,
    index: int,
    forward: Forward,
    watched: Mapping[nn.Module, Callable[..., None]],
) -> None:
    """One forward pass that shows each of these modules' calls: module, inputs, output."""

    def shown(
        show: Callable[..., None], module: nn.Module, args: Any, named: Any, out: Any
    ) -> None:
        show(module, args or tuple(named.values()), out)

    hooks = [
        module.register_forward_hook(partial(shown, show), with_kwargs=True)
        for module, show in watched.items()
    ]
    try:
        with running(model), torch.no_grad():
            run_or_explain(forward, model, batch, index)
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Watch:
    """One layer in two networks."""

    layer: nn.Module  # whose inputs are seen in the network that is fitted
    through: nn.Module | None  # what these inputs go through, its bias apart
    dense: Any  # the layer whose outputs are seen in the other network
    count: int  # of features: what the inputs are then
    calls: int  # of each in a pass

    def features(self, inputs: torch.Tensor) -> torch.Tensor:
        """(positions, features)."""
        if self.through is None:
            return _as_rows(inputs, self.dense)
        with torch.no_grad():
            # Under autocast they come in another dtype than the weights are in.
            given = inputs.to(cast(Any, self.through).weight.dtype)
            rows = _as_rows(self.through(given), self.dense)
        bias = cast(Any, self.through).bias
        return rows if bias is None else rows - bias.detach()


def collect(
    watch: Watch,
    model: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Any],
    forward: Forward,
    sampler: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Features in `model`, responses in `teacher`: (positions, channels) each, float64.

    The positions are drawn where there are more than are needed. Calls that one network alone
    makes, or that are of other sizes there, as where the data decides what is run, do not count;
    None if there are no others. Raises CalibrationError for NaN and infinity.
    """
    most = max(_POSITIONS, _TIMES_FEATURES * watch.count)
    each = math.ceil(most / len(batches) / watch.calls)
    found = []
    for index, batch in enumerate(batches):
        inputs = _seen(model, watch.layer, batch, index, forward, watch.calls, inputs=True)
        outputs = _seen(teacher, watch.dense, batch, index, forward, watch.calls, inputs=False)
        for given, made in zip(inputs, outputs, strict=False):
            seen = [watch.features(given), _as_rows(made, watch.dense)]
            if len(seen[0]) != len(seen[1]):
                continue
            if not all_finite(seen):
                raise CalibrationError("a layer gives NaN or infinity while it is refitted")
            if len(seen[0]) > each:
                chosen = torch.randint(len(seen[0]), (each,), generator=sampler)
                seen = [one[chosen.to(one.device)] for one in seen]
            found.append([one.double() for one in seen])
    if not found:
        return None
    features, responses = (torch.cat(same) for same in zip(*found, strict=True))
    return features, responses


class _Enough(Exception):  # noqa: N818  (no error)
    """The rest of a forward pass is not needed."""


def _seen(
    network: nn.Module,
    layer: nn.Module,
    batch: Any,
    index: int,
    forward: Forward,
    calls: int,
    inputs: bool,
) -> list[torch.Tensor]:
    """What a layer is given, or gives, in each of its calls; what comes after is not run."""
    found: list[torch.Tensor] = []

    def note(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        # A copy: what follows may work in place.
        found.append((given[0] if inputs else output).detach().clone())
        if len(found) == calls:
            raise _Enough

    with contextlib.suppress(_Enough):
        run_watched(network, batch, index, forward, {layer: note})
    return found


def _as_rows(tensor: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """(positions, channels)."""
    if not has_features_last(layer):
        batched = tensor if tensor.dim() == cast(Any, layer).weight.dim() else tensor[None]
        tensor = batched.movedim(1, -1)
    return tensor.reshape(-1, tensor.shape[-1])
