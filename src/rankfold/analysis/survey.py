"""Which layers a network has, what they are called with, and which must be left alone."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, cast
from unittest import mock

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from rankfold.analysis.readers import Readers, carries_hooks
from rankfold.batches import (
    Data,
    Forward,
    all_finite,
    batch_size,
    device_of,
    first_batches,
    run_or_explain,
    running,
)
from rankfold.cost import count_macs, shape_of_call
from rankfold.errors import CalibrationError, ModelError
from rankfold.layers import TiedLayers
from rankfold.progress import Progress, silent

_MADE_BY_A_HOOK = (
    "its weight is made by a hook at every call: make it permanent first (torch.nn.utils."
    "remove_weight_norm, remove_spectral_norm, prune.remove)"
)
_ALSO = "its weight is also that of"
_ASKS_A_KIND = (
    torch.Tensor.dtype.__get__,  # type: ignore[attr-defined]
    torch.Tensor.device.__get__,
    torch.Tensor.is_floating_point,
)


@dataclass(frozen=True)
class SurveyedLayer:
    """A module with a weight of its own, as the first calibration batch met it."""

    name: str
    module: nn.Module
    input_shapes: tuple[tuple[int, ...], ...]  # one per call
    reason: str | None  # why it must be left alone whatever the method, or None
    reader: str | None = None  # of a recurrent layer: what alone reads its outputs, if linear
    tied: tuple[str, ...] = ()  # of `TiedLayers`: the other layers' names


@dataclass(frozen=True)
class Survey:
    layers: tuple[SurveyedLayer, ...]
    macs: int  # of the first batch
    batch_size: int  # of the first batch


def survey(
    model: nn.Module, data: Data, forward: Forward, batches: int, progress: Progress = silent
) -> Survey:
    """Run the first `batches` batches through the model in eval mode and look.

    Raises ModelError for weights that are not finite or a model that does not run, CalibrationError
    for data that yields nothing, and for a batch or activations of a layer that are not finite.
    """
    check_weights(model)
    check_kind(model)
    names = {module: name for name, module in model.named_modules()}
    shapes: dict[nn.Module, list[tuple[int, ...]]] = {}
    by_keyword: set[nn.Module] = set()
    current = 0

    def watch(
        module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any], output: Any
    ) -> None:
        if named and not inputs:
            by_keyword.add(module)
        # A packed batch costs what one sequence of all its steps does.
        given = inputs[0] if inputs else None
        given = given.data if isinstance(given, PackedSequence) else given
        if current == 0 and isinstance(given, torch.Tensor):
            shapes.setdefault(module, []).append(shape_of_call(module, given))
        if not all_finite(output):
            raise CalibrationError(
                f"layer '{names[module]}' ({type(module).__name__}) gives NaN or infinity on "
                f"batch {current}"
            )

    owners = _weight_owners(model)
    if not owners:
        raise ModelError("the model has no layer with a weight")
    unhooked = {module: _hooks(module) for module in owners}
    # Torch takes no such hooks on scripted modules.
    seen = [module for module in owners if not isinstance(module, torch.jit.ScriptModule)]
    leaves = [
        module
        for module in model.modules()
        if next(module.children(), None) is None and not isinstance(module, torch.jit.ScriptModule)
    ]
    reads = _OutsideReads(seen)
    readers = Readers(model, lambda module: type(module) is nn.Linear)
    hooks = list(readers.hooks)
    # Before the readers know of an output, so that looking at it is not reading it.
    looked_at = {*leaves, *seen}
    hooks += [
        module.register_forward_hook(watch, prepend=True, with_kwargs=True) for module in looked_at
    ]
    hooks += [module.register_forward_pre_hook(reads.enter) for module in seen]
    hooks += [module.register_forward_hook(reads.leave) for module in seen]
    size, macs = 1, 0

    def run(batch: Any) -> None:
        readers.returned(run_or_explain(forward, model, batch, 0))

    try:
        with torch.no_grad(), running(model):
            found = first_batches(data, batches, device_of(model))
            for index, batch in enumerate(progress(found, "calibrating")):
                current = index
                if not all_finite(batch):
                    raise CalibrationError(f"batch {index} of the data holds NaN or infinity")
                if index == 0:
                    size = batch_size(batch)
                    if size == 0:
                        raise CalibrationError("the first batch of the data holds no sample")
                    with readers, reads:  # within: the readers ask weights for their kind too
                        macs = count_macs(partial(run, batch))
                else:
                    run_or_explain(forward, model, batch, index)
    finally:
        for hook in hooks:
            hook.remove()
    shared = _shared_weights(owners, names)
    held = _held_otherwise(model)
    direct = {
        child: type(m).__name__
        for m in model.modules()
        if isinstance(m, nn.MultiheadAttention)
        for child in m.modules()
        if child is not m
    }
    reasons: dict[nn.Module, str | None] = {}
    for module in owners:
        reason = None
        if _is_made_by_a_hook(module):
            reason = _MADE_BY_A_HOOK
        elif isinstance(module, torch.jit.ScriptModule):
            reason = "it is TorchScript: put the module there that it came from"
        elif unhooked[module] is not None:
            reason = unhooked[module]
        elif "forward" in vars(module):
            reason = "its forward was replaced by another function, which would be lost"
        elif module in held:
            reason = f"the model also holds it as {held[module]}, past its submodules"
        elif parametrize.is_parametrized(module):
            reason = "its weight is parametrized: remove the parametrizations first"
        elif (kind := _unusual_kind(module)) is not None:
            reason = f"its weight is {kind}"
        elif module in shared:
            reason = f"{_ALSO} '{shared[module]}'"
        elif module in direct:
            reason = f"{direct[module]} reads its weight directly"
        elif module in by_keyword:
            reason = "the model names its input when it calls it, and forms have names of their own"
        elif module not in shapes:
            reason = "the forward pass never calls it"
        elif module in reads.found:
            reason = "the model reads its weight directly"
        reasons[module] = reason
    groups = _tied_groups(reasons, shapes, reads.found)
    layers = []
    for module, reason in reasons.items():
        if (group := groups.get(module)) is not None and module is group[0]:
            layers.append(_tied_layer(group, names, shapes))
            continue
        if group is not None:
            reason = f"it shares the weight of '{names[group[0]]}' and is factorized with it"
        reader = readers.only_reader(module) if isinstance(module, nn.RNNBase) else None
        # The reader's weight will change too.
        alone = None if reader is None or reasons[reader] is not None else names[reader]
        called_with = tuple(shapes.get(module, ()))
        layers.append(SurveyedLayer(names[module], module, called_with, reason, alone))
    return Survey(tuple(layers), macs, size)


def _tied_groups(
    reasons: Mapping[nn.Module, str | None],
    called: Mapping[nn.Module, object],
    read: Collection[nn.Module],
) -> dict[nn.Module, TiedLayers]:
    """By layer the layers that share its weight, where that is all that speaks against them.

    Embeddings and linear layers whose whole weight is one parameter, all of them called but for
    embeddings that are there to be shared.
    """
    by_weight: dict[int, list[nn.Module]] = {}
    for module in reasons:
        if type(module) in (nn.Embedding, nn.Linear):
            by_weight.setdefault(id(module.weight), []).append(module)
    groups: dict[nn.Module, TiedLayers] = {}
    for members in by_weight.values():
        storage = cast(torch.Tensor, members[0].weight).untyped_storage().data_ptr()
        sharing = [
            module
            for module in reasons
            for own in module.parameters(recurse=False)
            if own.untyped_storage().data_ptr() == storage
        ]
        if (
            len(members) > 1
            and len(sharing) == len(members)
            and not any(one in read for one in members)
            and any(one in called for one in members)
            and all(one in called or isinstance(one, nn.Embedding) for one in members)
            and all((reasons[one] or "").startswith(_ALSO) for one in members)
        ):
            groups |= dict.fromkeys(members, TiedLayers(members))
    return groups


def _tied_layer(
    group: TiedLayers,
    names: Mapping[nn.Module, str],
    shapes: Mapping[nn.Module, Sequence[tuple[int, ...]]],
) -> SurveyedLayer:
    first, *others = (names[layer] for layer in group)
    calls = tuple(shape for layer in group for shape in shapes.get(layer, ()))
    return SurveyedLayer(first, group, calls, None, None, tuple(others))


def check_kind(model: nn.Module) -> None:
    """Raise ModelError for a model that is a wrapper which knows of no layer but its own."""
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("a TorchScript model cannot be looked into: pass the module it came from")
    if is_compiled(model):
        raise ModelError(
            "a model that torch.compile made runs the layers that it was made of: pass the module "
            "it came from (model._orig_mod), and compile what comes out"
        )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ModelError(
            "DistributedDataParallel knows no weights but those that it was made with: pass "
            "model.module, and wrap what comes out"
        )


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` made the module around another."""
    # By name: to import its class takes seconds.
    return type(module).__name__ == "OptimizedModule" and hasattr(module, "_orig_mod")


def check_weights(model: nn.Module) -> None:
    """Raise ModelError unless every parameter is there and finite."""
    for name, parameter in model.named_parameters():
        layer = name.rpartition(".")[0]
        if nn.parameter.is_lazy(parameter):
            raise ModelError(f"layer '{layer}' is lazily initialised: run the model once first")
        if parameter.is_meta:
            raise ModelError(f"layer '{layer}' has no weights: it is on the meta device")
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            raise ModelError(f"parameter '{name}' of layer '{layer}' holds NaN or infinity")


class _OutsideReads(TorchFunctionMode):
    """Finds the modules whose `weight` is used while they are not running.

    Some models take a layer's weight, or ask for its dtype, past the layer's forward; put a
    factorized layer there and they break. To ask a parameter that was met among `parameters()` for
    its dtype or device is no such use: a factorized layer has parameters too.
    """

    def __init__(self, owners: Iterable[nn.Module]) -> None:
        super().__init__()
        self.owners: dict[int, list[nn.Module]] = {}  # by id of a weight, which several may share
        self.watched = dict.fromkeys(owners)
        for module in self.watched:
            if hasattr(module, "weight"):
                self.owners.setdefault(id(module.weight), []).append(module)
        self.inside: list[nn.Module] = []
        self.asked: set[nn.Module] = set()  # for their weight, by its name
        self.found: set[nn.Module] = set()

    def __enter__(self) -> Self:
        found_by_name = nn.Module.__getattr__

        def noted(module: nn.Module, name: str) -> Any:
            if module in self.watched and module not in self.inside:
                if name == "weight":
                    self.asked.add(module)
                elif name in module._parameters:  # a bias, None too: forms have it elsewhere
                    self.found.add(module)
            return found_by_name(module, name)

        self._patch = mock.patch.object(nn.Module, "__getattr__", noted)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        self._patch.stop()
        super().__exit__(*raised)

    def enter(self, module: nn.Module, inputs: Any) -> None:
        self.inside.append(module)

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.inside.remove(module)

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for argument in (*args, *(kwargs or {}).values()):
            sharing = self.owners.get(id(argument), [])
            outside = not any(module in self.inside for module in sharing)
            if outside and (function not in _ASKS_A_KIND or self.asked.intersection(sharing)):
                self.found.update(sharing)
        return function(*args, **(kwargs or {}))


def _weight_owners(model: nn.Module) -> list[nn.Module]:
    """Modules that own a parameter of two modes or more, in the order of the model."""

    def own_weights(module: nn.Module) -> Iterable[torch.Tensor]:
        inner = getattr(module, "parametrizations", nn.Module())
        return (*module.parameters(recurse=False), *inner.parameters())

    return [
        module
        for module in model.modules()
        if any(weight.dim() >= 2 for weight in own_weights(module))
        and not isinstance(module, nn.ParameterList | nn.ParameterDict)
        and not isinstance(module, parametrize.ParametrizationList)
    ]


def _unusual_kind(module: nn.Module) -> str | None:
    """Complex, integer or sparse: what the weights of a module are if no method is for them."""
    for weight in module.parameters(recurse=False):
        if weight.layout != torch.strided:
            return str(weight.layout).removeprefix("torch.")
        if not weight.is_floating_point():
            return str(weight.dtype).removeprefix("torch.")
    return None


def _hooks(module: nn.Module) -> str | None:
    """The reason not to replace a module that carries hooks of the user's: they would be lost."""
    return "it carries hooks, which would be lost" if carries_hooks(module) else None


def _is_made_by_a_hook(module: nn.Module) -> bool:
    """Whether a hook sets the weight from other parameters: weight norm, pruning."""
    return any(
        isinstance(value, torch.Tensor) and f"{name}{end}" in module._parameters
        for name, value in vars(module).items()
        for end in ("_orig", "_v")
    )


def _held_otherwise(model: nn.Module) -> dict[nn.Module, str]:
    """Modules that are found in attributes too, which a replacement would not reach: and where."""
    found: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        if is_compiled(module):
            found[module._orig_mod] = f"what torch.compile made of '{name}'"
        for attribute, value in vars(module).items():
            if attribute in ("_modules", "_parameters", "_buffers"):
                continue
            place = f"'{name}.{attribute}'".replace("'.", "'")
            leaves = _pytree.tree_leaves(value)
            found |= {leaf: place for leaf in leaves if isinstance(leaf, nn.Module)}
    return found


def _shared_weights(owners: list[nn.Module], names: dict[nn.Module, str]) -> dict[nn.Module, str]:
    """Modules whose weight is also another module's, with the name of that other."""
    by_storage: dict[int, list[nn.Module]] = {}
    for module in owners:
        for weight in module.parameters(recurse=False):
            if weight.dim() >= 2:
                by_storage.setdefault(weight.untyped_storage().data_ptr(), []).append(module)
    return {
        module: names[next(other for other in modules if other is not module)]
        for modules in by_storage.values()
        if len(set(modules)) > 1
        for module in modules
    }
