"""Layers of a network put in the place of others, for good or for a while."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import cast

from torch import nn

from rankfold.layers import TiedLayers

# What torch's own layers say of themselves.
_SIZES = {
    name
    for kind in (nn.Linear, nn.Conv1d, nn.ConvTranspose1d, nn.Embedding, nn.RNNBase, nn.RNNCellBase)
    for name in kind.__constants__
}


def put_in_place(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """The model with every place of these layers taken by others, shared ones included.

    `TiedLayers` have their layers' places taken by those of their form. Changes `model`; what is
    returned is another module only if the model itself is replaced.
    """
    replacements = _one_by_one(replacements)
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module in replacements:
            _answer_as(module, replacements[module])
            if not path:
                return replacements[module]
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, replacements[module])
    return model


@contextmanager
def swapped(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> Iterator[nn.Module]:
    """Within: `put_in_place`; after: the model as it was."""
    replacements = _one_by_one(replacements)
    undo: list[Callable[[], None]] = []
    for path, module in model.named_modules(remove_duplicate=False):
        if path and module in replacements:
            parent, _, child = path.rpartition(".")
            undo.append(partial(setattr, model.get_submodule(parent), child, module))
    try:
        yield put_in_place(model, replacements)
    finally:
        for restore in undo:
            restore()


def _answer_as(layer: nn.Module, replacement: nn.Module) -> None:
    """Have it say, of sizes and strides that it has none of itself, what the layer says.

    Some models ask their layers: WaveNet for the dilation, to pad by it.
    """
    if isinstance(replacement, nn.Identity):
        return
    for name in _SIZES:
        if name in vars(layer) and not hasattr(replacement, name):
            setattr(replacement, name, getattr(layer, name))


def _one_by_one(replacements: Mapping[nn.Module, nn.Module]) -> dict[nn.Module, nn.Module]:
    """Layers that share a weight are no module of the model, each of them is."""
    single: dict[nn.Module, nn.Module] = {}
    for old, new in replacements.items():
        if isinstance(old, TiedLayers):
            single |= zip(old, cast(nn.ModuleList, new), strict=True)
        else:
            single[old] = new
    return single
