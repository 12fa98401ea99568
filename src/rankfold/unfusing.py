"""Attention taken apart into layers that can be factorized, for a while or for good."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.utils import parametrize

from rankfold.layers import PROJECTIONS, UnfusedAttention
from rankfold.replacement import put_in_place, swapped


@contextmanager
def unfused(model: nn.Module) -> Iterator[nn.Module]:
    """Within: every `nn.MultiheadAttention` of the model made of linear layers; after: as it was.

    Torch's fast paths, which read weights past any forward, are off the while. An attention that is
    of a class of the user's, carries hooks, or shares weights with other modules, stays.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with swapped(model, {one: UnfusedAttention(one) for one in _fused(model)}) as opened:
            yield opened
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def unfuse(model: nn.Module, layers: Iterable[str]) -> nn.Module:
    """The model with those attentions taken apart of which a projection is among `layers`.

    The names are those within `unfused`. Changes `model`.
    """
    parents = {name.rpartition(".")[0] for name in layers if name.rpartition(".")[2] in PROJECTIONS}
    modules = {name: module for name, module in model.named_modules() if name in parents}
    able = set(_fused(model))
    return put_in_place(model, {m: UnfusedAttention(m) for m in modules.values() if m in able})


def leave_fast_paths(model: nn.Module) -> None:
    """Keep torch's transformer layers off paths that read weights of layers that are replaced.

    The attribute set to 0 is how torch itself says that the fast path does not know an activation.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            kinds = (type(module.self_attn), type(module.linear1), type(module.linear2))
            if kinds != (nn.MultiheadAttention, nn.Linear, nn.Linear):
                module.activation_relu_or_gelu = 0
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            getattr(layer, "activation_relu_or_gelu", 0) == 0 for layer in module.layers
        ):
            module.use_nested_tensor = False


def _fused(model: nn.Module) -> Iterator[nn.MultiheadAttention]:
    owners = Counter(id(own) for module in model.modules() for own in module.parameters(False))
    for module in model.modules():
        if type(module) is nn.MultiheadAttention and not any(
            part._forward_hooks
            or part._forward_pre_hooks
            or part._backward_hooks
            or part._backward_pre_hooks
            or parametrize.is_parametrized(part)
            for part in module.modules()
        ):
            owned = list(module.parameters())
            if all(owners[id(one)] == 1 and one.is_floating_point() for one in owned):
                yield module
