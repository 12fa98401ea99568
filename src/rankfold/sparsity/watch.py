"""Which channels of a network's layers stay or go together, seen while it runs on one batch.

Not every network can be traced, and in one that runs the shapes are there: every function of torch
is seen as it is dispatched, and the linear layers, convolutions and norms as a whole.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rankfold.analysis.readers import carries_hooks
from rankfold.batches import Forward, run_or_explain, running, tensors_of
from rankfold.layers import TRANSPOSED
from rankfold.narrowing import LAYERS, NORMS, PER_CHANNEL, channel_counts
from rankfold.sparsity.shadows import FIXED, Shadows, along, spread, storage_of


@dataclass(frozen=True)
class LayerChannels:
    """A linear layer or a convolution, and the channels on both of its sides."""

    name: str
    module: Any
    outputs: torch.Tensor  # (outputs,) numbers of channels; FIXED for those that have to stay
    inputs: torch.Tensor  # (inputs,)
    zero_inputs: torch.Tensor  # (inputs,) whether they are always 0
    norm: str | None  # the norm that alone reads the outputs, as they are

    @property
    def groups(self) -> int:
        """Of the inputs, each of which is read by as many outputs."""
        return 1 if isinstance(self.module, nn.Linear) else self.module.groups

    @property
    def output_axis(self) -> int | None:
        """Of the weight; None for a grouped transposed convolution, which has none."""
        if not isinstance(self.module, TRANSPOSED):
            return 0
        return 1 if self.groups == 1 else None


@dataclass(frozen=True)
class NormChannels:
    """A batch norm, an instance norm, or a PReLU, and its channels."""

    name: str
    module: Any
    channels: torch.Tensor  # (channels,)
    zero: torch.Tensor  # (channels,) whether what it reads, and what it gives, is always 0


@dataclass(frozen=True)
class Branch:
    """A residual branch: what is added to that which it begins with."""

    last: str  # the layer or norm whose outputs are added
    modules: tuple[str, ...]  # all layers and norms of the branch alone


@dataclass(frozen=True)
class Structure:
    """The channels of a network: of how many it is made, and what runs along them."""

    count: int  # FIXED included
    layers: tuple[LayerChannels, ...]
    norms: tuple[NormChannels, ...]
    branches: tuple[Branch, ...]
    fixing: frozenset[Any]  # the functions whose channels had to stay


def watch(
    model: nn.Module, batch: Any, forward: Forward, fixing: frozenset[Any] = frozenset()
) -> Structure:
    """See the model run on a batch, in eval mode.

    Channels that are read by anything that is not known to keep channels apart, that make the
    outputs or are given, stay; and those that functions of `fixing` move. Raises ModelError for
    a model that does not run.
    """
    with running(model), torch.no_grad(), _without_fast_path():
        seen = _Watch(model, fixing)
        try:
            with seen:
                outputs = run_or_explain(forward, model, batch, 0)
        finally:
            for hook in seen.hooks:
                hook.remove()
        seen.shadows.fix(*tensors_of(outputs))
    return seen.structure()


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """Within: torch's attention reads no weights past any forward."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)


@dataclass
class _Seen:
    """What is known of one watched module so far."""

    name: str
    module: Any
    outputs: torch.Tensor
    inputs: torch.Tensor
    zero_inputs: torch.Tensor
    zero_outputs: torch.Tensor
    readers: set[str | None]


class _Watch(TorchDispatchMode):
    def __init__(self, model: nn.Module, fixing: frozenset[Any]) -> None:
        super().__init__()
        self.shadows, self.fixing = Shadows(fixing), fixing
        self.seen: dict[str, _Seen] = {}
        self.read_by: list[tuple[int, str, str]] = []  # id of a layer's output, layer, norm
        self.exposed: set[str] = set()  # whose parameters are read past their forward
        self.hooks: list[Any] = []
        self.inside = 0
        self.owners: dict[int, str] = {}
        sharers = Counter(
            storage_of(own)
            for module in model.modules()
            for own in module.parameters(recurse=False)
        )
        for name, module in model.named_modules():
            if not _is_watched(module):
                continue
            for own in module.parameters(recurse=False):
                self.owners[storage_of(own)] = name
                if sharers[storage_of(own)] > 1:
                    self.exposed.add(name)
            self.hooks.append(module.register_forward_pre_hook(self._enter))
            self.hooks.append(module.register_forward_hook(_Leaving(self, name), with_kwargs=True))

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if not self.inside:
            for tensor in tensors_of((args, dict(kwargs or {}))):
                if (owner := self.owners.get(storage_of(tensor))) is not None:
                    self.exposed.add(owner)
            self.shadows.apply(func, args, kwargs or {}, made)
        return made

    def _enter(self, module: nn.Module, given: Any) -> None:
        self.inside += 1

    def leave(self, name: str, module: Any, given: torch.Tensor, made: torch.Tensor) -> None:
        """Note a call of a watched module."""
        axis = _channel_axis(module, made)
        shadow = self.shadows.read(given)
        inputs, zero = along(shadow.channels, axis), along(shadow.zeros, axis)
        if inputs is None or zero is None:
            self.shadows.fix(given)
            count = given.shape[axis]
            inputs, zero = torch.full((count,), FIXED), torch.zeros(count, dtype=torch.bool)
        if shadow.direct is not None and isinstance(module, PER_CHANNEL):
            self.read_by.append((id(given), shadow.direct, name))
        elif shadow.direct is not None:
            self.seen[shadow.direct].readers.add(None)
        known = self.seen.get(name)
        if known is None:
            known = self._first(name, module, inputs, zero)
        else:
            self.shadows.channels.join(known.inputs, inputs)
            known.zero_inputs = known.zero_inputs & zero
        zeros = _zero_outputs(module, zero)
        known.zero_outputs = known.zero_outputs & zeros
        self.shadows.put(
            made,
            spread(known.outputs, axis, made.shape),
            spread(zeros, axis, made.shape),
            [shadow],
            name,
            name,
        )

    def _first(self, name: str, module: Any, inputs: torch.Tensor, zero: torch.Tensor) -> _Seen:
        outputs = inputs
        if isinstance(module, LAYERS):
            outputs = self.shadows.channels.make(channel_counts(module)[0])
            groups = 1 if isinstance(module, nn.Linear) else cast(Any, module).groups
            if groups > 1:
                for read, given in zip(inputs.chunk(groups), outputs.chunk(groups), strict=True):
                    self.shadows.channels.join(read, given[:1])
                    self.shadows.channels.join(given, given[:1])
        nothing = torch.ones(len(outputs), dtype=torch.bool)
        self.seen[name] = _Seen(name, module, outputs, inputs, zero, nothing, set())
        return self.seen[name]

    def structure(self) -> Structure:
        """What was seen, the channels numbered from 1 on in the order in which they were made."""
        channels = self.shadows.channels
        for name in self.exposed & self.seen.keys():
            channels.fix(self.seen[name].inputs)
            channels.fix(self.seen[name].outputs)
        roots = {name: channels.roots(one.outputs) for name, one in self.seen.items()}
        roots_in = {name: channels.roots(one.inputs) for name, one in self.seen.items()}
        met = torch.cat([torch.tensor([FIXED]), *roots.values(), *roots_in.values()]).unique()

        def numbered(found: torch.Tensor) -> torch.Tensor:
            return torch.searchsorted(met, found)

        norms = self._norms()
        layers, per_channel = [], []
        for name, one in self.seen.items():
            outputs, inputs = numbered(roots[name]), numbered(roots_in[name])
            if isinstance(one.module, LAYERS):
                layer = LayerChannels(
                    name, one.module, outputs, inputs, one.zero_inputs, norms.get(name)
                )
                layers.append(layer)
            else:
                zero = one.zero_inputs & one.zero_outputs
                per_channel.append(NormChannels(name, one.module, outputs, zero))
        return Structure(
            len(met),
            tuple(layers),
            tuple(per_channel),
            tuple(dict.fromkeys(self._branches())),
            self.fixing,
        )

    def _norms(self) -> dict[str, str]:
        """By layer the norm that alone reads what it gives, each time."""
        makers: dict[str, set[str]] = {}
        for tensor, layer, reader in self.read_by:
            alone = self.shadows.reads_of(tensor) == 1
            self.seen[layer].readers.add(reader if alone else None)
            makers.setdefault(reader, set()).add(layer)
        found = {}
        for name, one in self.seen.items():
            if len(one.readers) == 1 and (norm := next(iter(one.readers))) is not None:
                calls = {self.shadows.calls_of(name), self.shadows.calls_of(norm)}
                exposed = {name, norm} & self.exposed
                is_norm = isinstance(self.seen[norm].module, NORMS)
                if is_norm and makers[norm] == {name} and len(calls) == 1 and not exposed:
                    found[name] = norm
        return found

    def _branches(self) -> Iterator[Branch]:
        for pair in self.shadows.sums:
            for branch, shortcut in (pair, pair[::-1]):
                begins_there = branch.before >> shortcut.step & 1
                if begins_there and branch.maker is not None and branch.maker not in self.exposed:
                    own = self.shadows.makers_in(branch.before & ~shortcut.before)
                    yield Branch(branch.maker, tuple(own))


class _Leaving:
    """The hook of a watched module that knows its name."""

    def __init__(self, watch: _Watch, name: str) -> None:
        self.watch, self.name = watch, name

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, made: torch.Tensor) -> None:
        given = args[0] if args else kwargs["input"]
        self.watch.leave(self.name, module, given, made)
        self.watch.inside -= 1


def _is_watched(module: nn.Module) -> bool:
    """Whether its forward is torch's own, and reads one tensor and its own parameters alone."""
    return (
        type(module) in (*LAYERS, *PER_CHANNEL)
        and "forward" not in vars(module)
        and not carries_hooks(module)
        and not (isinstance(module, nn.PReLU) and module.num_parameters == 1)
        and all(own.is_floating_point() for own in module.parameters())
    )


def _channel_axis(module: Any, made: torch.Tensor) -> int:
    """Of inputs and outputs of a watched module."""
    if isinstance(module, nn.Linear):
        return made.dim() - 1
    if isinstance(module, LAYERS):
        return made.dim() - (cast(Any, module).weight.dim() - 1)
    if isinstance(module, nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d):
        axes = {nn.InstanceNorm1d: 1, nn.InstanceNorm2d: 2, nn.InstanceNorm3d: 3}[type(module)]
        return made.dim() - 1 - axes
    return 1 if made.dim() > 1 else 0


def _zero_outputs(module: Any, zero: torch.Tensor) -> torch.Tensor:
    """Which outputs are always 0, of a module of which these inputs are."""
    if isinstance(module, nn.PReLU):
        return zero
    if isinstance(module, LAYERS):
        return _zero_of_layer(module, zero)
    shift, scale, mean = (getattr(module, name) for name in ("bias", "weight", "running_mean"))
    found = zero.clone() if mean is None else zero & (mean == 0).cpu()
    if scale is not None:
        found = found | (scale == 0).cpu()
    return found if shift is None else found & (shift == 0).cpu()


def _zero_of_layer(layer: Any, zero: torch.Tensor) -> torch.Tensor:
    used = rows_by_inputs(layer) & ~zero
    found = ~used.any(1)
    return found if layer.bias is None else found & (layer.bias == 0).cpu()


def rows_by_inputs(layer: Any) -> torch.Tensor:
    """(outputs, inputs): whether an output reads an input with a weight that is not 0."""
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    blocks = (layer.weight.detach() != 0).flatten(2) if layer.weight.dim() > 2 else None
    used = (layer.weight.detach() != 0) if blocks is None else blocks.any(2)
    used = used.cpu().unflatten(0, (groups, -1))  # (groups, outputs or inputs, the other)
    if isinstance(layer, TRANSPOSED):
        used = used.mT
    return torch.block_diag(*used).bool() if groups > 1 else used[0]
