"""Who reads the outputs of a layer, found while the network runs.

Where it is one linear layer and nothing else, what the outputs are made with can be multiplied into
that layer's weight (`rankfold.merging`).
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from rankfold.batches import tensors_of


class Readers(TorchFunctionMode):
    """Within: notes who reads what the recurrent layers and other watched modules of a model give.

    `watched` says which modules count as readers, and are read too: modules whose forward reads one
    tensor, its own parameters and nothing else. Whatever else gets a tensor is another reader:
    functions of torch, in-place ones and views included, modules with hooks of the user's, the
    caller. An `nn.Identity`, a dropout that drops nothing and other functions that give back the
    very tensor they were given are none. Of a recurrent layer that was given initial states, or
    whose final states are read, another reader is noted: what depends on the number of its units is
    not its outputs alone. What a model keeps in an attribute and nobody uses while it runs is not
    seen, nor what TorchScript reads.
    """

    def __init__(self, model: nn.Module, watched: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.dimensions: dict[nn.Module, set[int]] = defaultdict(set)
        """Of the tensors that a watched module was given."""
        self._calls: dict[nn.Module, list[int]] = defaultdict(list)  # the outputs, by id
        self._makers: dict[int, nn.Module] = {}
        self._readers: dict[int, list[nn.Module]] = defaultdict(list)  # that are watched
        self._given: dict[nn.Module, set[nn.Module | None]] = defaultdict(set)
        self._read_otherwise: set[nn.Module] = set()
        self._states: dict[int, nn.Module] = {}
        self._owners: dict[int, nn.Module] = {}
        self._used_otherwise: set[nn.Module] = set()  # their parameters, past their forward
        self._alive: list[Any] = []  # so that no other tensor gets the id of one that is known
        self._running: nn.Module | None = None  # that is watched
        self.hooks: list[RemovableHandle] = []
        for module in model.modules():
            hooked = carries_hooks(module)
            if isinstance(module, nn.RNNBase):
                self.hooks.append(module.register_forward_hook(self._made_states, with_kwargs=True))
            elif watched(module):
                self._owners |= {id(own): module for own in module.parameters(recurse=False)}
                enter = module.register_forward_pre_hook(self._enter, with_kwargs=True)
                self.hooks += [enter, module.register_forward_hook(self._leave)]
            if hooked:
                self.hooks.append(module.register_forward_hook(self._shown, with_kwargs=True))

    def only_reader(self, module: nn.Module) -> nn.Module | None:
        """The watched module that alone reads each output of `module` once, and nothing else.

        None if there is no such module. Of what ran so far.
        """
        readers = {tuple(self._readers[output]) for output in self._calls[module]}
        if len(readers) != 1 or len(alone := readers.pop()) != 1:
            return None
        (reader,) = alone
        free = module not in self._read_otherwise and self._given[reader] == {module}
        return reader if free and not {module, reader} & self._used_otherwise else None

    def returned(self, outputs: Any) -> None:
        """What the network returns is read by whoever called it."""
        for tensor in tensors_of(outputs):
            self._read_by_another(tensor)

    def __torch_function__(
        self,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        tensors = list(tensors_of((args, dict(kwargs or {}))))
        versions = [_version(tensor) for tensor in tensors]
        result = function(*args, **(kwargs or {}))
        # Torch's own counter of FLOPs asks for this of whatever goes into a module.
        asks_nothing = getattr(function, "__self__", None) is torch.Tensor.requires_grad
        # Within a watched module it is only that module that asks: it has no other code.
        if self._running is None and not asks_nothing:
            for tensor, version in zip(tensors, versions, strict=True):
                if not (result is tensor and version == _version(tensor)):
                    self._read_by_another(tensor)
        return result

    def _read_by_another(self, tensor: torch.Tensor) -> None:
        for known in (self._makers, self._states):
            if (module := known.get(id(tensor))) is not None:
                self._read_otherwise.add(module)
        if (module := self._owners.get(id(tensor))) is not None:
            self._used_otherwise.add(module)

    def _made(self, module: nn.Module, outputs: Any) -> None:
        self._alive.append(outputs)
        for tensor in tensors_of(outputs):
            self._makers[id(tensor)] = module
            self._calls[module].append(id(tensor))

    def _made_states(
        self, module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any], output: Any
    ) -> None:
        if len(inputs) > 1 or named.get("hx") is not None:
            self._read_otherwise.add(module)
        outputs, states = output
        self._made(module, outputs)
        self._alive.append(states)
        self._states |= {id(tensor): module for tensor in tensors_of(states)}

    def _enter(self, module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        self._running = module
        given = next(tensors_of((inputs, dict(named))), None)
        maker = self._makers.get(id(given))
        self._given[module].add(maker)
        if given is not None:
            self.dimensions[module].add(given.dim())
        if maker is not None:
            self._readers[id(given)].append(module)
        elif given is not None:
            self._read_by_another(given)

    def _leave(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._running = None
        self._made(module, output)

    def _shown(
        self, module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any], output: Any
    ) -> None:
        for tensor in tensors_of((inputs, dict(named), output)):
            self._read_by_another(tensor)


def carries_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks: what they do would be lost or changed with the module."""
    return any(
        (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
    )


def _version(tensor: torch.Tensor) -> float:
    """How often it was written to; NaN, which is never the same, where torch does not count."""
    return math.nan if tensor.is_inference() else tensor._version
