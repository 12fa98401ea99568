"""Who reads the outputs of a recurrent layer, found while the network runs.

Where it is one linear layer and nothing else, a readout of the outputs can be multiplied into that
layer's weight (`rankfold.merging`).
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from rankfold.batches import tensors_of


class Readers(TorchFunctionMode):
    """Within: notes which functions of torch get the outputs of the recurrent layers of a model.

    A layer that was given initial states, or whose final states are read, has a reader that is no
    linear layer: what depends on the number of its units is not its outputs alone.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._readers: dict[nn.Module, set[nn.Module | None]] = defaultdict(set)
        self._given: dict[nn.Module, set[nn.Module | None]] = defaultdict(set)
        self._outputs: dict[int, nn.Module] = {}
        self._states: dict[int, nn.Module] = {}
        self._alive: list[Any] = []  # so that no other tensor gets the id of one that is known
        self._linear: nn.Module | None = None  # that is running
        self.hooks: list[RemovableHandle] = []
        for module in model.modules():
            if isinstance(module, nn.RNNBase):
                self.hooks.append(module.register_forward_hook(self._made, with_kwargs=True))
            elif type(module) is nn.Linear:
                self.hooks.append(module.register_forward_pre_hook(self._enter))
                self.hooks.append(module.register_forward_hook(self._leave))

    def only_reader(self, module: nn.Module) -> nn.Module | None:
        """The linear layer that alone reads the module's outputs, and reads nothing else; or None.

        Of what ran so far.
        """
        readers = self._readers.get(module, set())
        reader = next(iter(readers)) if len(readers) == 1 else None
        return reader if reader is not None and self._given[reader] == {module} else None

    def returned(self, outputs: Any) -> None:
        """What the network returns is read by whoever called it."""
        for tensor in tensors_of(outputs):
            self._read_by(None, tensor)

    def __torch_function__(
        self,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # Torch's own counter of FLOPs asks for this of whatever goes into a module.
        if getattr(function, "__self__", None) is not torch.Tensor.requires_grad:
            # Within a linear layer it is only that layer that asks: it has no other code.
            for tensor in tensors_of((args, dict(kwargs or {}))):
                self._read_by(self._linear, tensor)
        return function(*args, **(kwargs or {}))

    def _read_by(self, reader: nn.Module | None, tensor: torch.Tensor) -> None:
        if (module := self._outputs.get(id(tensor))) is not None:
            self._readers[module].add(reader)
        if (module := self._states.get(id(tensor))) is not None:
            self._readers[module].add(None)

    def _made(
        self, module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any], output: Any
    ) -> None:
        if len(inputs) > 1 or named.get("hx") is not None:
            self._readers[module].add(None)
        outputs, states = output
        self._alive.append(output)
        self._outputs.update({id(tensor): module for tensor in tensors_of(outputs)})
        self._states.update({id(tensor): module for tensor in tensors_of(states)})

    def _enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._linear = module
        given = self._outputs.get(id(inputs[0])) if inputs else None
        self._given[module].add(given)

    def _leave(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._linear = None
