"""What is 0, or read by nobody, taken out of a network: channels, branches, places of kernels."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from rankfold.batches import Forward, device_of, run, to_device
from rankfold.copies import copy_of
from rankfold.errors import PlanError
from rankfold.layers import CONVOLUTIONS
from rankfold.narrowing import Kept, Removal, narrow, trim_limits
from rankfold.outputs import outputs_of
from rankfold.record import attach_record, record_of
from rankfold.sparsity.shadows import FIXED
from rankfold.sparsity.structure import (
    check_unchanged,
    find_structure,
    indices,
    with_one_each,
)
from rankfold.sparsity.watch import LayerChannels, NormChannels, Structure, rows_by_inputs


def remove_zero_groups(model: nn.Module, example: Any, *, forward: Forward = run) -> nn.Module:
    """A copy of the model without what is always 0 and what is read with weights of 0 alone.

    Of channels, all that makes them, scales them and reads them is taken out: of linear layers
    (behind a flattening too), convolutions (grouped ones by whole groups, depthwise, transposed),
    batch and instance norms, PReLUs, and through sums and concatenations. Places at either end of a
    kernel that are 0 go with as much padding. A layer whose outputs are all 0, as at the end of a
    residual branch, and those before it that nobody else reads, are `HollowLayer`s that give zeros.
    At least one channel stays.

    A channel stays that is constant but not 0, as a bias or the shift of a batch norm leaves it
    behind a filter of 0: what reads it behind a padding reads no constant. `GroupLasso` makes both
    0 together.

    `example` is one batch (see `rankfold.batches`), on which the model runs a few times; how it
    runs there is taken for how it always runs. Outputs in eval mode are the same up to rounding,
    which is checked. What is taken out, `find_zero_groups` says. A network that
    `rankfold.factorize` made remembers it (`rankfold.record_of(small).removed`), and can be saved
    and loaded. Raises ModelError for a model that does not run, is scripted, or gives other outputs
    after all.
    """
    return remove(model, find_zero_groups(model, example, forward=forward))


def remove(model: nn.Module, removal: Removal) -> nn.Module:
    """A copy of the model without what `find_zero_groups` found, in it or in one of its shapes.

    Raises PlanError for a removal from another network.
    """
    small = narrow(copy_of(model), removal)
    try:
        record = record_of(model)
    except PlanError:  # not made by rankfold
        return small
    done = replace(removal, merged_before=len(record.merged))
    attach_record(small, replace(record, removed=(*record.removed, done)))
    return small


def find_zero_groups(model: nn.Module, example: Any, *, forward: Forward = run) -> Removal:
    """What `remove_zero_groups` takes out of a model, which is not changed."""
    batch = to_device(example, device_of(model))
    cleared = copy_of(model)
    _clear_unscaled(find_structure(cleared, batch, forward))
    structure = find_structure(cleared, batch, forward)
    unneeded = _unneeded(structure)
    kept = with_one_each(structure, ~unneeded)
    found = [_of_layer(cleared, layer, kept, unneeded) for layer in structure.layers]
    found += [_of_norm(norm, kept) for norm in structure.norms]
    removal = Removal(tuple(one for one in found if one != Kept(one.module)))
    small = narrow(copy_of(model), removal)
    check_unchanged(outputs_of(model, batch, forward), outputs_of(small, batch, forward))
    return removal


def _clear_unscaled(structure: Structure) -> None:
    """Put to 0 what a norm multiplies by 0."""
    norms: dict[str | None, Any] = {norm.name: norm.module for norm in structure.norms}
    with torch.no_grad():
        for layer in structure.layers:
            norm, axis = norms.get(layer.norm), layer.output_axis
            if norm is not None and norm.weight is not None and axis is not None:
                gone = norm.weight == 0
                layer.module.weight.transpose(0, axis)[gone] = 0
                for other in (layer.module.bias, norm.running_mean):
                    if other is not None:
                        other[gone] = 0


def _unneeded(structure: Structure) -> torch.Tensor:
    """(channels,): whether nothing that is needed reads it, but as 0 or by weights of 0."""
    used = {
        layer.name: rows_by_inputs(layer.module) & ~layer.zero_inputs
        for layer in structure.layers
        if layer.groups == 1  # else what reads a channel also makes it
    }
    needed = torch.ones(structure.count, dtype=torch.bool)
    while True:
        found = torch.zeros_like(needed)
        found[FIXED] = True
        for layer in structure.layers:
            if layer.name in used:
                found[layer.inputs[used[layer.name][needed[layer.outputs]].any(0)]] = True
        if torch.equal(found, needed):
            return ~needed
        needed = found


def _of_layer(
    model: nn.Module, layer: LayerChannels, kept: torch.Tensor, unneeded: torch.Tensor
) -> Kept:
    outputs, inputs = indices(kept[layer.outputs]), indices(kept[layer.inputs])
    module = layer.module
    used = rows_by_inputs(module) & ~layer.zero_inputs
    silent = ~used.any(1)
    if module.bias is not None:
        silent &= (module.bias == 0).cpu()
    hollow = bool((silent | unneeded[layer.outputs]).all()) and _may_be_hollow(model, layer.name)
    trimmed = None
    if isinstance(module, CONVOLUTIONS) and not hollow:
        trimmed = _trimmed(module, used)
    return Kept(layer.name, outputs, inputs, trimmed, hollow)


def _may_be_hollow(model: nn.Module, name: str) -> bool:
    """Whether nothing but a call is made of the layer."""
    parent = model.get_submodule(name.rpartition(".")[0])
    ours = type(parent).__module__.startswith("rankfold.layers")
    return isinstance(parent, nn.Sequential) or not ours


def _of_norm(norm: NormChannels, kept: torch.Tensor) -> Kept:
    hollow = bool(norm.zero.all()) and not isinstance(norm.module, nn.PReLU)
    return Kept(norm.name, indices(kept[norm.channels]), hollow=hollow)


def _trimmed(layer: Any, used: torch.Tensor) -> tuple[int, ...] | None:
    """How many places at either end of each axis of the kernel only read with weights of 0."""
    rows, columns = used.any(1), used.any(0)
    places = layer.weight.detach().cpu()[rows]
    if layer.groups == 1:
        places = places[:, columns]
    places = (places != 0).flatten(0, 1).any(0)
    found = []
    for axis, most in enumerate(trim_limits(layer)):
        others = [other for other in range(places.dim()) if other != axis]
        along = (places.any(others) if others else places).nonzero().flatten()
        last = places.shape[axis] - 1
        free = min(int(along[0]), last - int(along[-1])) if len(along) else most
        found.append(min(most, free))
    return tuple(found) if any(found) else None
