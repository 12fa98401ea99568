"""Which layers a network has, what they are called with, and which must be left alone."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

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
from rankfold.cost import count_macs
from rankfold.errors import CalibrationError, ModelError
from rankfold.progress import Progress, silent

# These read `linear1.weight` and its like directly on their fast path, past any forward.
_READERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.MultiheadAttention)


@dataclass(frozen=True)
class SurveyedLayer:
    """A module with a weight of its own, as the first calibration batch met it."""

    name: str
    module: nn.Module
    input_shapes: tuple[tuple[int, ...], ...]  # one per call
    reason: str | None  # why it must be left alone whatever the method, or None
    reader: str | None = None  # of a recurrent layer: what alone reads its outputs, if linear


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
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("a TorchScript model cannot be looked into: pass the module it came from")
    names = {module: name for name, module in model.named_modules()}
    shapes: dict[nn.Module, list[tuple[int, ...]]] = {}
    current = 0

    def watch(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        # A packed batch costs what one sequence of all its steps does.
        given = inputs[0] if inputs else None
        given = given.data if isinstance(given, PackedSequence) else given
        if current == 0 and isinstance(given, torch.Tensor):
            shapes.setdefault(module, []).append(tuple(given.shape))
        if not all_finite(output):
            raise CalibrationError(
                f"layer '{names[module]}' ({type(module).__name__}) gives NaN or infinity on "
                f"batch {current}"
            )

    owners = _weight_owners(model)
    if not owners:
        raise ModelError("the model has no layer with a weight")
    unhooked = {module: _hooks(module) for module in owners}
    leaves = [module for module in model.modules() if not any(module.children())]
    reads = _OutsideReads(owners)
    readers = Readers(model, lambda module: type(module) is nn.Linear)
    hooks = list(readers.hooks)
    # Before the readers know of an output, so that looking at it is not reading it.
    looked_at = {*leaves, *owners}
    hooks += [module.register_forward_hook(watch, prepend=True) for module in looked_at]
    hooks += [module.register_forward_pre_hook(reads.enter) for module in owners]
    hooks += [module.register_forward_hook(reads.leave) for module in owners]
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
                    with reads, readers:
                        macs = count_macs(partial(run, batch))
                else:
                    run_or_explain(forward, model, batch, index)
    finally:
        for hook in hooks:
            hook.remove()
    shared = _shared_weights(owners, names)
    direct = {
        child: type(m).__name__
        for m in model.modules()
        if isinstance(m, _READERS)
        for child in m.modules()
        if child is not m
    }
    reasons: dict[nn.Module, str | None] = {}
    for module in owners:
        reason = unhooked[module]
        if parametrize.is_parametrized(module):
            reason = "its weight is parametrized: remove the parametrizations first"
        elif (kind := _unusual_kind(module)) is not None:
            reason = f"its weight is {kind}"
        elif module in shared:
            reason = f"its weight is also that of '{shared[module]}'"
        elif module in direct:
            reason = f"{direct[module]} reads its weight directly"
        elif module not in shapes:
            reason = "the forward pass never calls it"
        elif module in reads.found:
            reason = "the model reads its weight directly"
        reasons[module] = reason
    layers = []
    for module, reason in reasons.items():
        reader = readers.only_reader(module) if isinstance(module, nn.RNNBase) else None
        # The reader's weight will change too.
        alone = None if reader is None or reasons[reader] is not None else names[reader]
        called_with = tuple(shapes.get(module, ()))
        layers.append(SurveyedLayer(names[module], module, called_with, reason, alone))
    return Survey(tuple(layers), macs, size)


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
    factorized layer there and they break.
    """

    def __init__(self, owners: Iterable[nn.Module]) -> None:
        super().__init__()
        self.owner = {id(module.weight): module for module in owners if hasattr(module, "weight")}
        self.inside: list[nn.Module] = []
        self.found: set[nn.Module] = set()

    def enter(self, module: nn.Module, inputs: Any) -> None:
        self.inside.append(module)

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.inside.remove(module)

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for argument in (*args, *(kwargs or {}).values()):
            module = self.owner.get(id(argument))
            if module is not None and module not in self.inside:
                self.found.add(module)
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
