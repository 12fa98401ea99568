"""The channels of a network that can be taken out, found and tried."""

from typing import Any, cast

import torch
from torch import nn

from rankfold.batches import Forward
from rankfold.copies import copy_of
from rankfold.errors import ModelError, PlanError
from rankfold.layers import TRANSPOSED
from rankfold.narrowing import Kept, Removal, narrow
from rankfold.outputs import check_same, outputs_of
from rankfold.sparsity.shadows import FIXED, RESHAPES, SLICES
from rankfold.sparsity.watch import Structure, watch


def find_structure(model: nn.Module, batch: Any, forward: Forward) -> Structure:
    """What was seen while the model ran on a batch, tried with either half of the channels.

    Where that gives other outputs than weights of 0 for what is taken out, or does not run, sizes
    or places may be written in the network's code: channels that are reshaped then stay, or those
    that are sliced, or both. Raises ModelError for a model that does not run, is scripted, or
    cannot be tried at all.
    """
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise ModelError("a TorchScript model cannot be looked into: pass the module it came from")
    reasons = []
    for fixing in (frozenset(), RESHAPES, SLICES, RESHAPES | SLICES):
        structure = watch(model, batch, forward, fixing)
        half = torch.rand(structure.count, generator=torch.Generator().manual_seed(0)) < 0.5
        try:
            for kept in (half, ~half):
                _try(model, structure, kept, batch, forward)
        except (ModelError, PlanError) as error:
            reasons.append(str(error))
        else:
            return structure
    raise ModelError(f"channels cannot be taken out of this network: {reasons[-1]}")


def _try(
    model: nn.Module, structure: Structure, kept: torch.Tensor, batch: Any, forward: Forward
) -> None:
    """Take channels out; ModelError if that differs from not reading them."""
    kept[FIXED] = True
    kept = with_one_each(structure, kept)
    wide = copy_of(model)
    with torch.no_grad():
        for layer in structure.layers:
            if layer.groups == 1:  # else what reads a channel also makes it
                weight = wide.get_submodule(layer.name).weight
                axis = 0 if isinstance(layer.module, TRANSPOSED) else 1
                cast(torch.Tensor, weight).transpose(0, axis)[~kept[layer.inputs]] = 0
    outputs = outputs_of(wide, batch, forward)
    small = narrow(wide, removal_of(structure, kept))
    check_unchanged(outputs, outputs_of(small, batch, forward))


def zeros_reach_readers(
    model: nn.Module, structure: Structure, batch: Any, forward: Forward
) -> torch.Tensor:
    """(channels,): whether what is made as 0 is 0 still where layers read it."""
    silent = copy_of(model)
    with torch.no_grad():
        names = [one.name for one in structure.layers] + [one.name for one in structure.norms]
        for module in map(silent.get_submodule, names):
            for own in module.parameters(recurse=False):
                own.zero_()
            if getattr(module, "running_mean", None) is not None:
                cast(Any, module).running_mean.zero_()
    reached = torch.ones(structure.count, dtype=torch.bool)
    for layer in watch(silent, batch, forward, structure.fixing).layers:
        reached[layer.inputs[~layer.zero_inputs]] = False
    return reached


def removal_of(structure: Structure, kept: torch.Tensor) -> Removal:
    """What takes out of a network the channels that are not kept: (channels,), True or False."""
    layers = (
        Kept(layer.name, indices(kept[layer.outputs]), indices(kept[layer.inputs]))
        for layer in structure.layers
    )
    norms = (Kept(norm.name, indices(kept[norm.channels])) for norm in structure.norms)
    return Removal((*layers, *norms))


def with_one_each(structure: Structure, kept: torch.Tensor) -> torch.Tensor:
    """The same and, of a layer that would lose all outputs, the first."""
    kept = kept.clone()
    for layer in structure.layers:
        if not kept[layer.outputs].any():
            kept[layer.outputs[0]] = True
    return kept


def indices(kept: torch.Tensor) -> tuple[int, ...] | None:
    """Where it is True; None for everywhere."""
    return None if kept.all() else tuple(kept.nonzero().flatten().tolist())


def check_unchanged(before: Any, after: Any) -> None:
    """Raise ModelError if outputs differ by more than rounding can explain."""
    check_same(
        before,
        after,
        1 / 2,
        "without what is 0 its outputs are others: something reads it in a way that was not seen",
    )
