"""A factorized network as a dense one again: of low rank still, ready to be analysed anew."""

import copy
from typing import Any

import torch
from torch import nn

from rankfold.errors import UnsupportedLayerError
from rankfold.layers import is_transposed_linear


def dense_again(model: nn.Module, like: nn.Module) -> nn.Module:
    """A network of the classes and shapes of `like` that does what the factorized `model` does.

    `like` is the network that was factorized, or another of its kind. Every factorized layer
    becomes what its `to_dense()` gives, attentions that were taken apart included; all other
    parameters and buffers are copied. What `like` ties, trains or freezes stays so; neither network
    is changed. Raises UnsupportedLayerError, naming the layer, for a form that no dense layer is
    equal to (fewer units of a recurrent layer).
    """
    dense = copy.deepcopy(like)
    with torch.no_grad():
        _copy(model, dense, "")
    return dense


def _copy(source: Any, target: nn.Module, name: str) -> None:
    if type(source) is not type(target):
        if not hasattr(source, "to_dense"):
            raise UnsupportedLayerError(
                f"layer '{name}' is a {type(source).__name__}, which no dense layer is equal to"
            )
        source = source.to_dense()
    # Hugging Face's Conv1D stores the transpose.
    turned = is_transposed_linear(target) and not is_transposed_linear(source)
    given = {
        **dict(source.named_parameters(recurse=False)),
        **dict(source.named_buffers("", False)),
    }
    own = {**dict(target.named_parameters(recurse=False)), **dict(target.named_buffers("", False))}
    for key, tensor in own.items():
        value = given.get(key)
        value = value.mT if turned and key == "weight" and value is not None else value
        if value is None or value.shape != tensor.shape:
            raise UnsupportedLayerError(
                f"'{key}' of layer '{name}' is not of the shape of the dense layer's: it, or the "
                "layer before it, is of a form that no dense layer is equal to"
            )
        tensor.copy_(value)
    children = dict(source.named_children())
    for key, child in target.named_children():
        _copy(children.get(key), child, f"{name}.{key}" if name else key)
