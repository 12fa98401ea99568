"""A network whose parameters are in files: those of one module at a time are in memory."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankfold.batches import Forward, run_or_explain, running
from rankfold.errors import ModelError
from rankfold.fingerprint import add_to
from rankfold.pretrained import empty_pretrained
from rankfold.shards import Shards
from rankfold.without_weights import without_weights

_Visit = Callable[[nn.Module, tuple[Any, ...]], None]


class FiledNetwork:
    """A model with its parameters on the meta device, and the files of them.

    Of transformers, or made by `like`. Raises ModelError if the files lack a parameter or hold
    another shape or dtype than the model has.
    """

    def __init__(self, directory: Path, like: Callable[[], nn.Module] | None = None) -> None:
        if like is None:
            self.model = empty_pretrained(directory)
        else:
            with without_weights():
                self.model = like().eval()
        self.shards = Shards.of(directory)
        self._parameters = list(self.model.parameters())  # alive, so that an id stays one's own
        self._name_of: dict[int, str] = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if name not in self.shards.file_of:
                continue
            self._name_of.setdefault(id(tensor), name)
            if not tensor.is_meta:  # a buffer
                tensor.copy_(self.shards.tensor(name))
        for name, parameter in self.model.named_parameters():
            if id(parameter) not in self._name_of:
                raise ModelError(f"{directory}: its weights lack '{name}'")
            stored = self.stored(parameter)
            for what, theirs, ours in (
                ("shape", tuple(stored.shape), tuple(parameter.shape)),
                ("dtype", stored.dtype, parameter.dtype),
            ):
                if theirs != ours:
                    raise ModelError(
                        f"{directory}: '{name}' has {what} {theirs}, by the model {ours}"
                    )

    def stored(self, parameter: torch.Tensor) -> torch.Tensor:
        """What the files hold of a parameter; of another tensor, itself."""
        name = self._name_of.get(id(parameter))
        return self.shards.tensor(name) if name is not None and parameter.is_meta else parameter

    @contextmanager
    def resident(self, module: nn.Module) -> Iterator[None]:
        """Within: a module's own parameters, not those of its children, are in memory."""
        own = {name: one for name, one in module._parameters.items() if one is not None}
        for name, parameter in own.items():
            module._parameters[name] = nn.Parameter(self.stored(parameter), requires_grad=False)
        try:
            yield
        finally:
            module._parameters.update(own)

    def run(self, batch: Any, forward: Forward, visit: _Visit) -> None:
        """Run the network once; `visit` gets every module that has parameters before it is called.

        With its inputs, its parameters resident. Raises ModelError for a network that uses
        parameters past their module's forward.
        """
        entered: dict[nn.Module, ExitStack] = {}

        def enter(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            entered[module] = ExitStack()
            entered[module].enter_context(self.resident(module))
            visit(module, inputs)

        def leave(module: nn.Module, inputs: Any, outputs: Any) -> None:
            entered.pop(module).close()

        hooks = []
        for module in self.model.modules():
            if any(True for _ in module.parameters(recurse=False)):
                hooks.append(module.register_forward_pre_hook(enter))
                hooks.append(module.register_forward_hook(leave))
        try:
            with torch.no_grad(), running(self.model):
                run_or_explain(forward, self.model, batch, 0)
        finally:
            for hook in hooks:
                hook.remove()
            for stack in entered.values():
                stack.close()

    def sha256(self) -> str:
        """As `weights_sha256` of the whole model in memory."""
        digest = hashlib.sha256()
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            add_to(digest, name, self.stored(tensor))
        return digest.hexdigest()
