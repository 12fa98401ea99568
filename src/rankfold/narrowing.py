"""Layers of a network with channels of theirs taken out, by a list of what is kept."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import nn

from rankfold.errors import PlanError
from rankfold.layers import CONVOLUTIONS, TRANSPOSED, HollowLayer
from rankfold.replacement import put_in_place

LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)
NORMS: tuple[type[nn.Module], ...] = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
PER_CHANNEL: tuple[type[nn.Module], ...] = (*NORMS, nn.PReLU)

Indices = tuple[int, ...]


@dataclass(frozen=True)
class Kept:
    """What is left of one linear layer, convolution, batch or instance norm, or PReLU."""

    module: str
    outputs: Indices | None = None  # ascending; None: all
    inputs: Indices | None = None  # of layers alone
    trimmed: Indices | None = None  # places off either end of each axis of the kernel
    hollow: bool = False  # a layer gives zeros, a norm nothing but its input

    def to_json(self) -> dict[str, Any]:
        """What is left as JSON primitives."""
        fields = asdict(self).items()
        return {name: list(one) if isinstance(one, tuple) else one for name, one in fields}


@dataclass(frozen=True)
class Removal:
    """What was taken out of a network at once."""

    kept: tuple[Kept, ...] = ()
    merged_before: int = 0  # of the pairs that were made one (`rankfold.merging`)

    def to_json(self) -> dict[str, Any]:
        """The removal as JSON primitives."""
        return {
            "merged_before": self.merged_before,
            "kept": [one.to_json() for one in self.kept],
        }

    @staticmethod
    def from_json(document: Any) -> "Removal":
        """The removal of a JSON document; raises PlanError, saying where, for anything else."""
        if not isinstance(document, dict) or set(document) != {"merged_before", "kept"}:
            raise PlanError(f"removal: {document!r:.80} is none")
        before, kept = document["merged_before"], document["kept"]
        if type(before) is not int or before < 0 or not isinstance(kept, list):
            raise PlanError(f"removal: {document!r:.80} is none")
        return Removal(tuple(_kept_from_json(one) for one in kept), before)


def _kept_from_json(document: Any) -> Kept:
    names = {"module", "outputs", "inputs", "trimmed", "hollow"}
    if not isinstance(document, dict) or set(document) != names:
        raise PlanError(f"removal: {document!r:.80} does not say what is left of a module")
    module, hollow = document["module"], document["hollow"]
    if not isinstance(module, str) or not isinstance(hollow, bool):
        raise PlanError(f"removal: {document!r:.80} does not say what is left of a module")
    indices = {}
    for name in ("outputs", "inputs", "trimmed"):
        value = document[name]
        if value is not None:
            whole = isinstance(value, list) and all(type(one) is int for one in value)
            if not whole or min(value, default=-1) < 0:
                raise PlanError(f"removal: '{name}' of '{module:.80}' is {value!r:.80}")
            value = tuple(value)
        indices[name] = value
    return Kept(module, hollow=hollow, **indices)


def narrow(model: nn.Module, removal: Removal) -> nn.Module:
    """The model with what the removal does not keep taken out of its modules.

    That the modules still fit each other is for the caller to know (`rankfold.sparsity`). A
    factorized layer with a hollow factor becomes a plain `nn.Sequential`. Nothing is allocated
    beyond what is there. Changes `model`, unless a module is not there or what would be kept of it
    is no part of it: raises PlanError.
    """
    modules = dict(model.named_modules())
    planned: list[tuple[nn.Module, Kept]] = []
    for kept in removal.kept:
        module = modules.get(kept.module)
        if module is None:
            raise PlanError(f"the model has no '{kept.module}' to take channels out of")
        if any(module is other for other, _ in planned):
            raise PlanError(f"channels are taken out of '{kept.module}' twice")
        _check(module, kept)
        planned.append((module, kept))
    hollow: dict[nn.Module, nn.Module] = {}
    for module, kept in planned:
        if isinstance(module, PER_CHANNEL):
            _narrow_per_channel(cast(Any, module), kept.outputs)
        else:
            _narrow_layer(cast(Any, module), kept)
        if kept.hollow:
            is_layer = isinstance(module, LAYERS)
            made = HollowLayer(cast(Any, module)) if is_layer else nn.Identity()
            hollow[module] = made.train(module.training)
    model = put_in_place(model, hollow)
    return put_in_place(model, dict(_hollow_forms(model)))


def channel_counts(module: Any) -> tuple[int, int]:
    """The outputs and inputs of a layer; of a norm or PReLU its channels, twice."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, nn.PReLU):
        return module.num_parameters, module.num_parameters
    if type(module) in NORMS:
        return module.num_features, module.num_features
    return module.out_channels, module.in_channels


def _check(module: Any, kept: Kept) -> None:
    """Raise PlanError unless what is kept is a part of the module that torch can make."""

    def refuse(reason: str) -> PlanError:
        return PlanError(f"'{kept.module}' is {module!r:.120}, {reason}")

    if type(module) not in (*LAYERS, *PER_CHANNEL):
        raise refuse("which channels cannot be taken out of")
    per_channel = isinstance(module, PER_CHANNEL)
    for count, indices in zip(channel_counts(module), (kept.outputs, kept.inputs), strict=True):
        if indices is not None and not _ascending(indices, count):
            raise refuse(f"of whose {count} channels {indices!s:.80} cannot be kept")
    if per_channel and not (kept.inputs is None and kept.trimmed is None):
        raise refuse("which has neither inputs nor a kernel of its own")
    if kept.hollow and isinstance(module, nn.PReLU):
        raise refuse("which cannot be hollow")
    if not per_channel and _groups(module) > 1:
        _kept_groups(module, kept, refuse)
    if kept.trimmed is not None:
        spans = getattr(module, "kernel_size", None)
        if not isinstance(module, CONVOLUTIONS) or spans is None or len(kept.trimmed) != len(spans):
            raise refuse("whose kernel cannot be trimmed so")
        if any(off < 0 or off > limit for off, limit in _along(kept.trimmed, trim_limits(module))):
            raise refuse(f"whose kernel cannot lose {kept.trimmed} at either end")


def _ascending(indices: Indices, count: int) -> bool:
    inside = 0 < len(indices) <= count and indices[0] >= 0 and indices[-1] < count
    return inside and all(a < b for a, b in pairwise(indices))


def _along(first: Sequence[int], second: Sequence[int]) -> Iterable[tuple[int, int]]:
    return zip(first, second, strict=True)


def trim_limits(layer: Any) -> Indices:
    """How many places can go off either end of each axis of a kernel.

    The padding goes with them, so that it stays the same on both sides and the outputs stay where
    they were.
    """
    whole = [(length - 1) // 2 for length in layer.kernel_size]
    if isinstance(layer.padding, str):
        # Of "same" padding the odd place, if there is one, is at the end: there it stays.
        return tuple(whole if layer.padding == "same" else [0] * len(whole))
    sizes = zip(whole, layer.padding, layer.dilation, strict=True)
    return tuple(min(most, padding // dilation) for most, padding, dilation in sizes)


def _groups(layer: Any) -> int:
    return 1 if isinstance(layer, nn.Linear) else layer.groups


def _kept_groups(layer: Any, kept: Kept, refuse: Callable[[str], PlanError]) -> list[int]:
    """The groups that are kept, each whole; raises PlanError for parts of them."""
    groups, found = _groups(layer), []
    for count, indices in zip(channel_counts(layer), (kept.outputs, kept.inputs), strict=True):
        size = count // groups
        every = range(count) if indices is None else indices
        whole = sorted({index // size for index in every})
        if [g * size + place for g in whole for place in range(size)] != list(every):
            raise refuse("of which only whole groups can be kept")
        found.append(whole)
    if found[0] != found[1]:
        raise refuse("whose groups have to be kept on both sides")
    return found[0]


def _narrow_per_channel(module: Any, outputs: Indices | None) -> None:
    if outputs is None or (isinstance(module, nn.PReLU) and module.num_parameters == 1):
        return
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(module, name, None)
        if tensor is not None:
            _assign(module, name, tensor[_index(outputs, tensor)])
    name = "num_parameters" if isinstance(module, nn.PReLU) else "num_features"
    setattr(module, name, len(outputs))


def _narrow_layer(layer: Any, kept: Kept) -> None:
    outputs, inputs = kept.outputs, kept.inputs
    counts = channel_counts(layer)
    transposed, groups = isinstance(layer, TRANSPOSED), _groups(layer)
    weight = layer.weight.detach()
    if groups > 1:
        left = len(_kept_groups(layer, kept, PlanError))
        rows, columns = (inputs if transposed else outputs), None
        layer.groups = left
    else:
        rows, columns = (inputs, outputs) if transposed else (outputs, inputs)
    if rows is not None:
        weight = weight[_index(rows, weight)]
    if columns is not None:
        weight = weight[:, _index(columns, weight)]
    if kept.trimmed is not None:
        for axis, off in enumerate(kept.trimmed):
            weight = weight.narrow(2 + axis, off, weight.shape[2 + axis] - 2 * off)
        layer.kernel_size = tuple(weight.shape[2:])
        if not isinstance(layer.padding, str):
            sizes = zip(layer.padding, kept.trimmed, layer.dilation, strict=True)
            layer.padding = tuple(padding - off * d for padding, off, d in sizes)
        layer._reversed_padding_repeated_twice = _paddings_of(layer)
    _assign(layer, "weight", weight)
    if outputs is not None and layer.bias is not None:
        _assign(layer, "bias", layer.bias.detach()[_index(outputs, layer.bias)])
    made = (
        counts[0] if outputs is None else len(outputs),
        counts[1] if inputs is None else len(inputs),
    )
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = made
    else:
        layer.out_channels, layer.in_channels = made


def _paddings_of(layer: Any) -> list[int]:
    """What `nn.Conv` keeps for paddings of other modes than zeros: the last axis first."""
    if isinstance(layer.padding, str):
        found = []
        for length, dilation in reversed([*_along(layer.kernel_size, layer.dilation)]):
            total = dilation * (length - 1) if layer.padding == "same" else 0
            found += [total // 2, total - total // 2]
        return found
    return [padding for padding in reversed(layer.padding) for _ in range(2)]


def _index(indices: Indices, like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(indices, dtype=torch.long, device=like.device)


def _assign(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """A parameter or buffer of this value, stored in the format of the one before."""
    old = getattr(module, name)
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(old.dim())
    stored = torch.contiguous_format
    if last is not None:
        # A 1x1 kernel is of both formats; which one was meant, its strides tell.
        meant = torch.empty(old.shape, device="meta", memory_format=last).stride()
        stored = last if old.stride() == meant else stored
    laid_out = torch.empty(value.shape, dtype=old.dtype, device=old.device, memory_format=stored)
    laid_out.copy_(value.detach())
    if isinstance(old, nn.Parameter):
        setattr(module, name, nn.Parameter(laid_out, old.requires_grad))
    else:
        setattr(module, name, laid_out)


def _hollow_forms(model: nn.Module) -> Iterable[tuple[nn.Module, nn.Module]]:
    """The factorized layers with a factor that is hollow, and what they are now."""
    for module in model.modules():
        is_form = isinstance(module, nn.Sequential) and hasattr(module, "to_dense")
        if is_form and any(type(one) is HollowLayer for one in cast(Any, module)):
            yield module, nn.Sequential(*cast(Any, module)).train(module.training)
