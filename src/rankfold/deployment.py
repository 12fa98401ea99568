"""Linear maps that follow each other in a network, with nothing between them, made one.

Exact to rounding in eval mode, and for that alone: a network that is trained further is better
merged afterwards. Which maps follow each other is seen while the network runs on one batch, since
not every network can be traced (`rankfold.analysis.readers`).
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from rankfold.analysis.readers import Readers
from rankfold.analysis.survey import check_weights
from rankfold.batches import (
    Forward,
    device_of,
    run,
    to_device,
    uncompiled,
)
from rankfold.copies import copy_of
from rankfold.errors import ModelError, PlanError
from rankfold.merging import Pair, channel_dimension, is_layer, is_norm, merge_pairs, merged
from rankfold.outputs import check_same, outputs_of
from rankfold.record import attach_record, record_of

_OTHERS = (
    "the merged network gives other outputs: something reads what is between two layers, or a "
    "weight, in a way that was not seen"
)


def fold_batch_norms(model: nn.Module, example: Any, *, forward: Forward = run) -> nn.Module:
    """A copy of the model, in eval mode, whose batch norms are folded into layers beside them.

    A batch norm that alone reads the outputs of a linear layer or a convolution, grouped and
    transposed ones included, or of a factorized layer, becomes part of its weight and bias; one
    that comes before a linear layer or a convolution that pads with no zeros becomes part of
    that. In its place is an `nn.Identity`. Left are those whose statistics are the batch's, and
    wherever something else reads what is between, a weight is shared, parametrized or read past
    its layer, or hooks are carried.

    `example` is one batch (see `rankfold.batches`), on which the model runs three times; how it
    runs there is taken for how it always runs. The outputs are the same up to rounding. A network
    that `rankfold.factorize` made remembers, and can be saved and loaded. Raises ModelError for a
    model that does not run, is scripted, has no finite weights, or gives other outputs after all.
    """
    return _merge(model, example, forward, lambda first, second: is_norm(first) or is_norm(second))


def merge_adjacent(model: nn.Module, example: Any, *, forward: Forward = run) -> nn.Module:
    """`fold_batch_norms`, and linear layers and convolutions that follow each other are one too.

    Wherever a 1x1 convolution (of stride 1, without groups or padding), or a linear layer, alone
    reads the outputs of a convolution without groups, or of a linear layer, and their product has
    no more parameters and MACs than the two: the last factor of one layer and the first of the next
    among them. The product is in the place of the first; in that of the second is an `nn.Identity`.
    """
    return _merge(model, example, forward, lambda first, second: True)


def _merge(
    model: nn.Module,
    example: Any,
    forward: Forward,
    wanted: Callable[[nn.Module, nn.Module], bool],
) -> nn.Module:
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("a TorchScript model cannot be looked into: pass the module it came from")
    check_weights(model)
    small = copy_of(model).eval()
    batch = to_device(example, device_of(small))
    pairs = tuple(_pairs(small, _watch(small, batch, forward), wanted))
    # Of the unwatched network: hooks keep some of torch's modules off their fast path.
    outputs = outputs_of(small, batch, forward)
    small = merge_pairs(small, pairs)
    check_same(outputs, outputs_of(small, batch, forward), 1 / 3, _OTHERS)
    try:
        record = record_of(model)
    except PlanError:  # not made by rankfold
        return small
    attach_record(small, replace(record, merged=record.merged + pairs))
    return small


def _watch(model: nn.Module, batch: Any, forward: Forward) -> Readers:
    """Who read what while the model ran."""
    sharers = Counter(
        own.untyped_storage().data_ptr()
        for module in model.modules()
        for own in module.parameters(recurse=False)
    )

    def may_change(module: nn.Module) -> bool:
        own = module.parameters(recurse=False)
        return (
            (is_layer(module) or is_norm(module))
            and not module.training
            and "forward" not in vars(module)
            and all(sharers[parameter.untyped_storage().data_ptr()] == 1 for parameter in own)
        )

    readers = Readers(model, may_change)

    def watched(network: nn.Module, given: Any) -> Any:
        with readers:
            outputs = forward(network, given)
            readers.returned(outputs)
        return outputs

    try:
        with uncompiled():
            outputs_of(model, batch, watched)
    finally:
        for hook in readers.hooks:
            hook.remove()
    return readers


def _pairs(
    model: nn.Module, readers: Readers, wanted: Callable[[nn.Module, nn.Module], bool]
) -> Iterator[Pair]:
    """The names of what can be merged, in the order in which it is."""
    names = {module: name for name, module in model.named_modules()}
    alone = {module: readers.only_reader(module) for module in names}
    follows = {module: reader for module, reader in alone.items() if reader is not None}
    for start in follows:
        if start not in follows.values():
            yield from _pairs_of_chain(_chain(start, follows), names, readers, wanted)


def _chain(start: nn.Module, follows: Mapping[nn.Module, nn.Module]) -> Iterator[nn.Module]:
    module: nn.Module | None = start
    while module is not None:
        yield module
        module = follows.get(module)


def _pairs_of_chain(
    chain: Iterator[nn.Module],
    names: Mapping[nn.Module, str],
    readers: Readers,
    wanted: Callable[[nn.Module, nn.Module], bool],
) -> Iterator[Pair]:
    """Each as soon as it can be; what came of it may be merged with what was before it."""
    done: list[tuple[str, nn.Module]] = []
    for module in chain:
        done.append((names[module], module))
        while len(done) > 1:
            (first_name, first), (second_name, second) = done[-2:]
            if not wanted(first, second) or not _of_one_axis(first, second, readers):
                break
            both = merged(first, second)
            if both is None or not all(torch.isfinite(own).all() for own in both.parameters()):
                break
            yield first_name, second_name
            done[-2:] = [(first_name if is_layer(first) else second_name, both)]


def _of_one_axis(first: nn.Module, second: nn.Module, readers: Readers) -> bool:
    """Whether a batch norm scales the axis that the layer beside it makes or reads."""
    for norm, layer in ((first, second), (second, first)):
        if is_norm(norm) and is_layer(layer):
            return readers.dimensions[norm] == {channel_dimension(layer)}
    return True
