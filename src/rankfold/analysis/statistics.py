"""Second moments of the inputs of layers and of the gradients at their outputs.

One streaming pass: every batch runs forward once and backward once for each probe of the outputs,
and what is kept are the moments alone. Of recurrent layers both are those of the states, which are
what their recurrent weights multiply; the gradients at a state come through all that reads it, the
next step too.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from rankfold import processes
from rankfold.analysis.curvature import Curvature
from rankfold.analysis.gram import add_gram
from rankfold.analysis.unrolled import run_unrolled
from rankfold.batches import Forward, all_finite, batch_size, run_or_explain, running
from rankfold.errors import CalibrationError, ModelError
from rankfold.layers import (
    CELLS,
    RECURRENT,
    TRANSPOSED,
    Cell,
    Convolution,
    Dense,
    Recurrent,
    TiedLayers,
    Transposed,
    block_names,
    has_features_last,
)

Layer = Dense | Transposed | Recurrent | Cell | nn.Embedding | TiedLayers

# Up to this many entries of a patch its whole moment is kept; of larger ones, the channels'.
PATCH_LIMIT = 2304
# Of more outputs than this only the diagonal of the gradients' moment is kept.
DIAGONAL_LIMIT = 8192
# Positions of a call that count at most: this many, or so many that all batches together give ten
# times the entries of a patch.
_POSITIONS = 1024
_TIMES_ENTRIES = 10


@dataclass(frozen=True)
class Statistics:
    """What the calibration data says of one layer; all tensors float64 on the CPU.

    Those of a grouped convolution are stacked, one for the channels of each group. Of a recurrent
    layer `inputs` and `gradients` are (layers * directions, hidden, hidden) and `magnitudes`
    (layers * directions, hidden): of the states, in the order of h_n. Of an embedding `inputs` and
    `magnitudes` are the frequencies of the tokens, (n,), as if each had been there once more: a few
    batches without one do not say that it never comes.
    """

    inputs: torch.Tensor  # A = E[x xᵀ], of patches (in * kernel,) squared, or channels (in, in)
    magnitudes: torch.Tensor  # E|x|, (in * kernel,) or (in,) likewise
    gradients: Mapping[str, torch.Tensor]  # by curvature: G = E[g gᵀ], (out, out), or, of more than
    # DIAGONAL_LIMIT outputs, its diagonal (out,)
    positions: float  # at which the weight is applied in one sample: the outputs of the layer,
    # or the inputs of a transposed convolution
    given: "Statistics | None" = None  # of a recurrent layer: its inputs, (in, in)


def pack_statistics(layers: Mapping[str, Statistics]) -> dict[str, Any]:
    """Statistics by layer for a journal."""
    return {name: _packed(one) for name, one in layers.items()}


def unpack_statistics(packed: Mapping[str, Any]) -> dict[str, Statistics]:
    """What `pack_statistics` made."""
    return {name: _unpacked(one) for name, one in packed.items()}


def _packed(one: Statistics) -> dict[str, Any]:
    given = None if one.given is None else _packed(one.given)
    return {**one.__dict__, "given": given}


def _unpacked(packed: Mapping[str, Any]) -> Statistics:
    given = packed["given"]
    return Statistics(**{**packed, "given": None if given is None else _unpacked(given)})


def gather(
    model: nn.Module,
    layers: Mapping[str, Layer],
    batches: Iterable[Any],
    forward: Forward,
    curvatures: Sequence[Curvature],
    *,
    expected: int = 1,
    probes: int = 1,
    seed: int = 0,
) -> dict[str, Statistics]:
    """The statistics of the named layers, from all batches, the model in eval mode on its device.

    Products of float32 rows are added up in float64. Where a call has very many positions, random
    ones of them count: the fewer, the more batches are `expected`. A layer without gradients (its
    outputs do not reach the model's, or the model forbids them) has none in its statistics. Of
    several processes each takes its share of the batches. Raises CalibrationError, naming layer and
    batch, for activations or gradients that are not finite, ModelError for a model that does not
    run.
    """
    tied = {name: layer for name, layer in layers.items() if isinstance(layer, TiedLayers)}
    parts = {f"{name}, {i}": one for name, layer in tied.items() for i, one in enumerate(layer)}
    single: dict[str, Any] = {n: one for n, one in layers.items() if n not in tied}
    layers = single | parts
    sums = {name: [_Sums() for _ in _blocks(layer)] for name, layer in layers.items()}
    draws = {curvature.name: probes for curvature in curvatures}
    watcher = _Watcher(sums, draws, expected, torch.Generator())
    probing = torch.Generator()
    samples = 0
    hooks = [
        layer.register_forward_hook(partial(watcher.forward, name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        with running(model), _frozen(model), torch.enable_grad(), _cudnn_for(model):
            for index, batch in enumerate(batches):
                if index % processes.count() != processes.index():
                    continue
                # What is drawn for a batch is the same whoever takes it.
                watcher.generator.manual_seed(processes.seed_of(seed, index))
                probing.manual_seed(processes.seed_of(seed, index))
                watcher.batch = index
                samples += batch_size(batch)
                outputs = run_or_explain(forward, model, batch, index)
                for curvature in curvatures:
                    watcher.curvature = curvature.name
                    for _ in range(probes):
                        _run_backward(curvature, outputs, batch, index, probing)
    finally:
        for hook in hooks:
            hook.remove()
    samples = sum(processes.gathered(samples))
    for blocks in sums.values():
        for block in blocks:
            block.add_up()
    found = {
        name: _stacked([block.mean(samples) for block in blocks], layers[name])
        for name, blocks in sums.items()
        if blocks[0].positions > 0
    }
    for name, layer in tied.items():
        known = [found.pop(f"{name}, {place}", None) for place in range(len(layer))]
        uses = [(one, use) for one, use in zip(known, layer, strict=True) if one is not None]
        if uses:
            found[name] = _of_shared(uses, [curvature.name for curvature in curvatures])
    return found


def _run_backward(
    curvature: Curvature, outputs: Any, batch: Any, index: int, generator: torch.Generator
) -> None:
    """One draw; what only runs forward, as what writes over its activations, is told how to go."""
    try:
        curvature.backward(outputs, batch, generator)
    except RuntimeError as error:
        raise ModelError(
            f"the model does not run backward on batch {index}: {str(error).splitlines()[0]:.160}; "
            "a forward= under torch.no_grad() has it analyzed without gradients"
        ) from error


def _of_shared(uses: Sequence[tuple[Statistics, nn.Module]], names: Sequence[str]) -> Statistics:
    """Of a weight E (n, d) that several layers use: as of an embedding, all their losses together.

    An error Δ of E costs a layer ½ T tr(Δᵀ D Δ S): D (n,) weighs its rows, S (d, d) its columns.
    The inputs of an embedding are D, its gradients S; of a linear layer it is the other way round,
    with the diagonal of its gradients' moment. The sum of the products D ⊗ S is taken for the one
    product with the same sums over rows and over columns, D that of the first curvature.
    """
    rows: torch.Tensor | None = None
    columns: dict[str, torch.Tensor] = {}
    for name in names:
        weighed = [_weights_of(one, layer, name) for one, layer in uses]
        pairs = [
            (one.positions, *both) for (one, _), both in zip(uses, weighed, strict=True) if both
        ]
        if not pairs:
            continue
        columns[name] = torch.stack([t * d.sum() * s for t, d, s in pairs]).sum(0)
        if rows is None:
            rows = torch.stack([t * s.trace() * d for t, d, s in pairs]).sum(0)
    if rows is None:
        looked_up = [one.inputs for one, layer in uses if isinstance(layer, nn.Embedding)]
        outputs = cast(Any, uses[0][1]).weight.shape[0]
        rows = looked_up[0] if looked_up else torch.ones(outputs, dtype=torch.float64)
    total = rows.sum()
    rows = rows / total if total > 0 else torch.full_like(rows, 1 / len(rows))
    return Statistics(rows, rows, columns, 1.0)


def _weights_of(
    statistics: Statistics, layer: nn.Module, curvature: str
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """D and S of one layer's use of a shared weight; None without gradients."""
    gradients = statistics.gradients.get(curvature)
    if gradients is None:
        return None
    if isinstance(layer, nn.Embedding):
        return statistics.inputs, gradients
    return gradients if gradients.dim() == 1 else gradients.diagonal(), statistics.inputs


def _blocks(layer: nn.Module) -> Sequence[str]:
    """What there is one moment of each: a layer; each layer and direction of a recurrent one.

    And, last, the inputs of that.
    """
    return [*block_names(layer), "given"] if isinstance(layer, RECURRENT) else ("",)


def _stacked(blocks: Sequence[Statistics], layer: nn.Module) -> Statistics:
    if not isinstance(layer, nn.RNNBase | Cell):
        return blocks[0]
    given = None
    if isinstance(layer, nn.RNNBase):
        *blocks, given = blocks
    curvatures = list(dict.fromkeys(name for block in blocks for name in block.gradients))
    nothing = torch.zeros_like(blocks[0].inputs)  # of a block whose states nothing reads
    return Statistics(
        torch.stack([block.inputs for block in blocks]),
        torch.stack([block.magnitudes for block in blocks]),
        {
            name: torch.stack([block.gradients.get(name, nothing) for block in blocks])
            for name in curvatures
        },
        blocks[0].positions,
        given,
    )


@dataclass
class _Sums:
    """Running sums of one layer, or of one direction of one layer of a recurrent one."""

    inputs: torch.Tensor | None = None
    magnitudes: torch.Tensor | None = None
    positions: int = 0
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    gradient_counts: dict[str, int] = field(default_factory=dict)

    def add_inputs(self, rows: torch.Tensor, positions: int) -> None:
        """Of a call that is sampled, the rows stand for all its positions."""
        share = positions / rows.shape[-2] if rows.numel() else 1.0
        self.inputs = add_gram(self.inputs, rows, share)
        magnitude = share * rows.abs().double().sum(-2)
        self.magnitudes = magnitude + (0 if self.magnitudes is None else self.magnitudes)
        self.positions += positions

    def add_lookups(self, ids: torch.Tensor, count: int) -> None:
        """Of token ids of any shape, of so many tokens that there are."""
        found = torch.bincount(ids.flatten(), minlength=count).double()
        self.inputs = found if self.inputs is None else self.inputs + found
        self.magnitudes = self.inputs
        self.positions += ids.numel()

    def add_gradients(self, curvature: str, rows: torch.Tensor, positions: int) -> None:
        """Likewise; `count_gradients` says over how many it will be the mean."""
        share = positions / max(1, rows.shape[-2])
        total = self.gradients.get(curvature)
        if rows.shape[-1] > DIAGONAL_LIMIT:
            squares = share * rows.double().square().sum(-2)
            self.gradients[curvature] = squares if total is None else total + squares
        else:
            self.gradients[curvature] = add_gram(total, rows, share)

    def count_gradients(self, curvature: str, positions: int) -> None:
        self.gradient_counts[curvature] = self.gradient_counts.get(curvature, 0) + positions

    def add_up(self) -> None:
        """Over all processes."""
        sums = {"inputs": self.inputs, "magnitudes": self.magnitudes}
        here = {name: one for name, one in sums.items() if one is not None}
        gradients = {f"gradients {name}": one for name, one in self.gradients.items()}
        total = processes.add_up(here | gradients)
        self.inputs, self.magnitudes = total.pop("inputs", None), total.pop("magnitudes", None)
        self.gradients = {name.removeprefix("gradients "): one for name, one in total.items()}
        counts: Counter[str] = Counter()
        for found in processes.gathered(self.gradient_counts):
            counts.update(found)
        self.gradient_counts = dict(counts)
        self.positions = sum(processes.gathered(self.positions))

    def mean(self, samples: int) -> Statistics:
        assert self.inputs is not None and self.magnitudes is not None
        inputs, magnitudes, seen = self.inputs, self.magnitudes, self.positions
        if inputs.dim() == 1:  # of tokens, as if each had been there once more
            inputs, magnitudes, seen = inputs + 1, magnitudes + 1, seen + len(inputs)
        return Statistics(
            (inputs / seen).cpu(),
            (magnitudes / seen).cpu(),
            {
                name: (total / self.gradient_counts[name]).cpu()
                for name, total in self.gradients.items()
            },
            self.positions / samples,
        )


class _Watcher:
    """The hooks."""

    def __init__(
        self,
        sums: Mapping[str, Sequence[_Sums]],
        draws: Mapping[str, int],
        expected: int,
        generator: torch.Generator,
    ) -> None:
        self.sums = sums
        self.draws = draws  # by curvature, how often the outputs run backward
        self.expected = expected
        self.generator = generator
        self.batch = 0
        self.curvature = ""

    def forward(
        self,
        name: str,
        module: Any,
        inputs: tuple[Any, ...],
        named: Mapping[str, Any],
        output: Any,
    ) -> Any:
        if isinstance(module, nn.RNNBase):
            given = dict(zip(("input", "hx"), inputs, strict=False), **named)
            return self._recurrent(name, module, given["input"], given.get("hx"), output)
        if isinstance(module, CELLS):
            given = inputs[0] if inputs else named["input"]
            return self._cell(name, given, output)
        (total,) = self.sums[name]
        rows = (inputs[0] if inputs else next(iter(named.values()))).detach()
        with torch.inference_mode(False), torch.no_grad():
            self._check(rows, f"layer '{name}' is given", "")
            if isinstance(module, nn.Embedding):
                total.add_lookups(rows, module.num_embeddings)
            else:
                multiplied = rows if isinstance(module, TRANSPOSED) else output
                outputs = output.shape[-1] if has_features_last(module) else module.weight.shape[0]
                positions = multiplied.numel() // outputs
                total.add_inputs(_by_group(module, self._input_rows(module, rows)), positions)
        if not torch.is_grad_enabled() or output.is_inference():
            return output
        return _watched(output, partial(self._backward, name, module))

    def _backward(self, name: str, module: Any, gradient: torch.Tensor) -> None:
        (total,) = self.sums[name]
        every = gradient.detach()
        self._check(every, f"layer '{name}' gets", "gradients ")
        if not has_features_last(module):
            every = _batched(module, every).movedim(1, -1)
        every = every.reshape(-1, every.shape[-1])
        rows = every[self._some(len(every), every.shape[1])]
        total.add_gradients(self.curvature, _by_group(module, rows), len(every))
        total.count_gradients(self.curvature, len(every))

    def _recurrent(self, name: str, module: Any, given: Any, hx: Any, output: Any) -> Any:
        data = given.data if isinstance(given, PackedSequence) else given
        self._check(data.detach(), f"layer '{name}' is given", "")
        traced = torch.is_grad_enabled() and not data.is_inference()
        with torch.inference_mode(False), torch.set_grad_enabled(traced):
            data = self._given(name, data)
            given = PackedSequence(data, *given[1:]) if isinstance(given, PackedSequence) else data
            found = run_unrolled(module, given, hx, partial(self._states, name))
        return found if traced else output

    def _given(self, name: str, data: torch.Tensor) -> torch.Tensor:
        """Take note of the inputs of all steps, (..., inputs)."""
        total = self.sums[name][-1]
        rows = data.detach().reshape(-1, data.shape[-1])
        with torch.no_grad():
            total.add_inputs(rows[self._some(*rows.shape)], len(rows))
        if not torch.is_grad_enabled():
            return data
        for curvature, times in self.draws.items():
            total.count_gradients(curvature, times * len(rows))
        # What the caller may see is left without gradients if it was.
        data = data if data.requires_grad else data.detach()
        return _watched(data, partial(self._given_backward, name))

    def _given_backward(self, name: str, gradient: torch.Tensor) -> None:
        rows = gradient.detach().reshape(-1, gradient.shape[-1])
        self._check(rows, f"layer '{name}' passes on", "gradients ")
        chosen = rows[self._some(*rows.shape)]
        self.sums[name][-1].add_gradients(self.curvature, chosen, len(rows))

    def _cell(self, name: str, given: torch.Tensor, output: Any) -> Any:
        self._check(given.detach(), f"layer '{name}' is given", "")
        states, *others = output if isinstance(output, tuple) else (output,)
        traced = torch.is_grad_enabled() and not states.is_inference()
        with torch.inference_mode(False), torch.set_grad_enabled(traced):
            states = self._states(name, 0, states)
        if not traced:
            return output
        return (states, *others) if others else states

    def _states(self, name: str, block: int, states: torch.Tensor) -> torch.Tensor:
        """Take note of the states of one step, (sequences, hidden) or (hidden,)."""
        total = self.sums[name][block]
        count = states[..., 0].numel()
        with torch.no_grad():
            total.add_inputs(states.detach().reshape(count, -1), count)
        if not torch.is_grad_enabled():
            return states
        # Steps that no output of the network goes back to have gradients too: of zero.
        for curvature, times in self.draws.items():
            total.count_gradients(curvature, times * count)
        return _watched(states, partial(self._state_backward, name, block))

    def _state_backward(self, name: str, block: int, gradient: torch.Tensor) -> None:
        rows = gradient.detach().reshape(-1, gradient.shape[-1])
        self._check(rows, f"layer '{name}' gets", "gradients ")
        self.sums[name][block].add_gradients(self.curvature, rows, len(rows))

    def _check(self, tensor: torch.Tensor, who: str, what: str) -> None:
        if not all_finite(tensor):
            raise CalibrationError(f"{who} {what}NaN or infinity on batch {self.batch}")

    def _input_rows(self, layer: Any, given: torch.Tensor) -> torch.Tensor:
        """What the layer multiplies its weight with, one position a row."""
        if has_features_last(layer):
            rows = given.reshape(-1, given.shape[-1])
            return rows[self._some(len(rows), rows.shape[1])]
        if isinstance(layer, TRANSPOSED) or layer.weight[0].numel() > PATCH_LIMIT:
            rows = _batched(layer, given).movedim(1, -1).reshape(-1, layer.in_channels)
            return rows[self._some(len(rows), rows.shape[1])]
        patches = _patches(layer, given)
        positions = (patches.shape[0], *patches.shape[1 : patches.dim() // 2])
        count = torch.Size(positions).numel()
        chosen = self._some(count, layer.weight[0].numel())
        if isinstance(chosen, slice):
            chosen = torch.arange(count)
        places = torch.unravel_index(chosen.to(given.device), positions)
        return patches[places].flatten(1)

    def _some(self, count: int, entries: int) -> torch.Tensor | slice:
        """All positions, or random ones of very many."""
        most = max(_POSITIONS, math.ceil(_TIMES_ENTRIES * entries / self.expected))
        if count <= most:
            return slice(None)
        return torch.randint(count, (most,), generator=self.generator)


def _by_group(layer: Dense | Transposed, rows: torch.Tensor) -> torch.Tensor:
    """Rows (positions, entries); of a grouped convolution (groups, positions, entries of each)."""
    groups = 1 if has_features_last(layer) else cast(Convolution, layer).groups
    if groups == 1:
        return rows
    return rows.reshape(len(rows), groups, rows.shape[1] // groups).movedim(1, 0)


def _batched(layer: Convolution | Transposed, tensor: torch.Tensor) -> torch.Tensor:
    """(samples, channels, ...), also of a single sample without its own dimension."""
    return tensor if tensor.dim() == layer.weight.dim() else tensor[None]


def _patches(layer: Convolution, given: torch.Tensor) -> torch.Tensor:
    """A view (samples, *positions, channels, *kernel) of what a convolution multiplies."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    around = cast(Any, layer)._reversed_padding_repeated_twice
    padded = nn.functional.pad(_batched(layer, given), around, mode=mode).contiguous()
    samples, channels, *lengths = padded.shape
    first, second, *steps = padded.stride()
    geometry = zip(lengths, layer.kernel_size, layer.stride, layer.dilation, strict=True)
    positions = [
        (length - dilation * (size - 1) - 1) // stride + 1
        for length, size, stride, dilation in geometry
    ]
    return padded.as_strided(
        (samples, *positions, channels, *layer.kernel_size),
        (
            first,
            *(step * stride for step, stride in zip(steps, layer.stride, strict=True)),
            second,
            *(step * dilation for step, dilation in zip(steps, layer.dilation, strict=True)),
        ),
    )


def _watched(output: torch.Tensor, seen: Any) -> torch.Tensor:
    """With the gradient shown to `seen`: a copy, because what follows may work in place."""
    output = (output if output.requires_grad else output.requires_grad_()).clone()
    # What has no derivative (integer arithmetic of quantized layers) hands on no gradient at all.
    output.register_hook(lambda gradient: None if gradient is None else seen(gradient))
    return output


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradients of parameters: they would cost as much as those that are wanted."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _cudnn_for(model: nn.Module) -> Any:
    """Off for recurrent layers: cuDNN's have no backward pass in eval mode, torch's own have."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    return torch.backends.cudnn.flags(enabled=not recurrent)
