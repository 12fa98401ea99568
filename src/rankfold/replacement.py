"""Layers of a network put in the place of others, for good or for a while."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from torch import nn


def put_in_place(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """The model with every place of these layers taken by others, shared ones included.

    Changes `model`; what is returned is another module only if the model itself is replaced.
    """
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module in replacements:
            if not path:
                return replacements[module]
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, replacements[module])
    return model


@contextmanager
def swapped(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> Iterator[nn.Module]:
    """Within: `put_in_place`; after: the model as it was."""
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
