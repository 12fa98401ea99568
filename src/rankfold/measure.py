"""What a network costs and how well it does, before and after, side by side."""

import gc
import math
import statistics
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import truediv
from typing import Any

import torch
from rich.table import Table
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rankfold import processes
from rankfold.batches import (
    Data,
    Forward,
    batch_size,
    device_of,
    first_batches,
    run,
    run_or_explain,
    running,
    split_batch,
    tensors_of,
)
from rankfold.clock import mark, seconds_between, wait
from rankfold.copies import copy_of
from rankfold.cost import count_macs, count_parameters
from rankfold.errors import CalibrationError, ModelError, RankfoldError
from rankfold.layers import StructuredLinear
from rankfold.outputs import references
from rankfold.progress import Progress, silent
from rankfold.runtime import Runtime, caller
from rankfold.tables import Shown

Metric = Callable[[nn.Module, Data], float]  # higher is better

_ROUNDS = (7, 200)  # at least and at most, per model
_SECONDS = 3.0  # of timing per model, within the rounds


@dataclass(frozen=True)
class Measurement:
    """One network, measured."""

    parameters: int
    macs: int  # of one sample
    latency_ms: float  # of one batch, median
    peak_memory_bytes: int  # of weights and activations alive at once in one forward pass
    metric: float | None


@dataclass(frozen=True)
class Comparison(Shown):
    """Two networks measured in the same run, on the same inputs."""

    before: Measurement
    after: Measurement
    batch_size: int
    threads: int
    device: str
    memory_formats: tuple[str, str]
    output_error: float  # norm of the outputs' difference over that of the original's
    runtime: Runtime = "eager"  # that the latencies are of
    products: tuple[str, ...] = ()
    """Of layers of small tensors in the second: what their products take in either way."""

    @property
    def speedup(self) -> float:
        """How many times faster the second network is."""
        return self.before.latency_ms / self.after.latency_ms

    def __rich__(self) -> Table:
        table = Table(
            title=f"batch {self.batch_size}, {self.threads} threads, {self.device}, {self.runtime}",
            caption=f"memory format: {' → '.join(self.memory_formats)}; "
            f"relative output error {self.output_error:.3g}"
            + "".join(f"\n{one}" for one in self.products),
        )
        for column in ("", "before", "after", "ratio"):
            table.add_column(column, justify="left" if not column else "right")
        before, after = self.before, self.after
        for label, unit, scale in (
            ("parameters", "M", 1e6),
            ("macs", "M", 1e6),
            ("latency_ms", "ms", 1),
            ("peak_memory_bytes", "MB", 1e6),
        ):
            first, second = getattr(before, label) / scale, getattr(after, label) / scale
            both = f"{first:.4g} {unit}", f"{second:.4g} {unit}"
            table.add_row(_ROWS[label], *both, _times(first, second))
        if before.metric is not None and after.metric is not None:
            change = f"{after.metric - before.metric:+.4f}"
            table.add_row("metric", f"{before.metric:.4f}", f"{after.metric:.4f}", change)
        return table


def _times(before: float, after: float) -> str:
    if not before or not after:
        return "-"
    return f"{before / after:.2f}x less" if before >= after else f"{after / before:.2f}x more"


_ROWS = {
    "parameters": "parameters",
    "macs": "MACs per sample",
    "latency_ms": "latency per batch",
    "peak_memory_bytes": "peak memory",
}


def measure(
    original: nn.Module,
    model: nn.Module,
    data: Data,
    *,
    metric: Metric | None = None,
    forward: Forward = run,
    runtime: Runtime = "eager",
    progress: Progress = silent,
) -> Comparison:
    """Measure two networks in eval mode: parameters, MACs, latency, peak memory, metric.

    MACs, latency, memory and output error are those of the first batch of `data`; latencies are
    medians of alternating runs in the `runtime`. `metric(model, data)` is called once on each. Both
    networks must be on one device; they are measured in the memory format they have. Raises
    CalibrationError for data that yields nothing, ModelError for a model that does not run,
    DeviceError for a runtime that is not installed, RankfoldError for a metric
    that is not a finite number.
    """
    device = device_of(original)
    batch = next(first_batches(data, 1, device))
    models = (original, model)
    with running(original), running(model), torch.no_grad():
        outputs = [run_or_explain(forward, network, batch, 0) for network in models]
        error = output_error(outputs[0], outputs[1])
        del outputs
        calls = [_call(forward, network, batch) for network in models]
        macs = [count_macs(call) for call in calls]
        memory = [
            _bytes(network) + peak_activations(call)
            for network, call in zip(models, calls, strict=True)
        ]
        timed = [caller(network, batch, forward, runtime) for network in models]
        milliseconds = latencies(timed, device, progress)
    values: list[float | None] = [None, None]
    if metric is not None:
        values = [evaluate(metric, network, data) for network in progress(models, "evaluating")]
    size = batch_size(batch)
    before, after = (
        Measurement(count_parameters(network), round(m / size), ms, peak, value)
        for network, m, ms, peak, value in zip(
            models, macs, milliseconds, memory, values, strict=True
        )
    )
    formats = memory_format_of(original), memory_format_of(model)
    threads = torch.get_num_threads()
    products = tuple(_products(model))
    return Comparison(before, after, size, threads, str(device), formats, error, runtime, products)


def evaluate(metric: Metric, model: nn.Module, data: Data) -> float:
    """The metric of the model in eval mode; RankfoldError unless it gives a finite number.

    Of several processes one evaluates, for all.
    """
    return processes.from_first(lambda: _evaluate(metric, model, data))


def _evaluate(metric: Metric, model: nn.Module, data: Data) -> float:
    name = getattr(metric, "__name__", type(metric).__name__)
    with running(model), torch.no_grad():
        try:
            value = float(metric(model, data))
        except RankfoldError:
            raise
        except Exception as error:
            raise RankfoldError(
                f"the metric {name} failed: {type(error).__name__}: {error}"
            ) from error
    if not math.isfinite(value):
        raise RankfoldError(f"the metric {name} gives {value}, not a finite number")
    return value


def accuracy(model: nn.Module, data: Data) -> float:
    """Top-1 accuracy: the share of samples whose largest output is at the label.

    `data` yields (input, label) batches, outputs (n, classes), labels (n,). Raises CalibrationError
    for data without labels.
    """
    correct = total = 0
    device = device_of(model)
    with running(model), torch.no_grad():
        for batch in first_batches(data, None, device):
            _, labels = split_batch(batch)
            if labels is None:
                raise CalibrationError("accuracy needs (input, label) batches")
            correct += int((run(model, batch).argmax(1) == labels).sum())
            total += len(labels)
    return correct / total


def latencies(
    calls: Sequence[Callable[[], Any]],
    device: torch.device,
    progress: Progress = silent,
    seconds: float = _SECONDS,
) -> list[float]:
    """Median milliseconds of each call, the calls taking turns so that drift hits all alike.

    So many of each as fill the `seconds`, at least 7 and at most 200. Of several processes one
    takes the times, for all.
    """
    return processes.from_first(lambda: _latencies(calls, device, progress, seconds))


def _latencies(
    calls: Sequence[Callable[[], Any]], device: torch.device, progress: Progress, seconds: float
) -> list[float]:
    slowest = max(_warm_up(call, device) for call in calls)
    rounds = min(max(math.ceil(seconds / slowest), _ROUNDS[0]), _ROUNDS[1])
    times: list[list[float]] = [[] for _ in calls]
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in progress(range(rounds), "timing"):
            order = range(len(calls)) if turn % 2 == 0 else reversed(range(len(calls)))
            for index in order:
                times[index].append(_seconds(calls[index], device))
    finally:
        if collecting:
            gc.enable()
    return [1e3 * statistics.median(series) for series in times]


def in_fastest_memory_format(
    model: nn.Module,
    batch: Any,
    forward: Forward = run,
    progress: Progress = silent,
    runtime: Runtime = "eager",
) -> nn.Module:
    """The model, or a copy with channels-last convolution weights if that is faster on the batch.

    Both are timed in eval mode, taking turns. A model without 2-D convolutions comes back as it is,
    and so does any for ONNX Runtime, which has formats of its own.
    """
    if runtime == "onnxruntime" or not any(isinstance(m, nn.Conv2d) for m in model.modules()):
        return model
    models = (model, with_memory_format(model, "channels_last"))
    with running(models[0]), running(models[1]), torch.no_grad():
        calls = [caller(network, batch, forward, runtime) for network in models]
        milliseconds = latencies(calls, device_of(model), progress)
    return models[milliseconds.index(min(milliseconds))]


def with_memory_format(model: nn.Module, memory_format: str) -> nn.Module:
    """A copy of the model with its 4-D parameters and buffers in this format.

    "channels_last"; or "contiguous", which gives the model itself.
    """
    if memory_format == "contiguous":
        return model
    # torch declares this overload of `to` without its memory format.
    return copy_of(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def memory_format_of(model: nn.Module) -> str:
    """The format of the convolution weights: channels_last if any is stored so, or contiguous."""
    last = any(
        parameter.dim() == 4
        and parameter.is_contiguous(memory_format=torch.channels_last)
        and not parameter.is_contiguous()
        for parameter in model.parameters()
    )
    return "channels_last" if last else "contiguous"


def peak_activations(call: Callable[[], Any]) -> int:
    """The most bytes of tensors made by `call()` that are alive at once, on any device.

    Scratch space inside one operator is not seen.
    """
    tracker = _LiveBytes()
    with tracker:
        result = call()
    del result
    return tracker.peak


class _LiveBytes(TorchDispatchMode):
    """Adds up the storages that operators make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = {tensor.untyped_storage()._cdata for tensor in tensors_of((args, kwargs or {}))}
        result = operator(*args, **(kwargs or {}))
        for tensor in tensors_of(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known and storage._cdata not in given:
                self.known.add(storage._cdata)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return result

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


def output_error(original: Any, model: Any) -> float:
    """Norm of the difference of two (nested) outputs over that of the first, in float64.

    Of several tensors the root mean square (see `rankfold.outputs.references`); of nothing but
    zeros the norm itself. Raises ModelError if they do not have the same tensors, or none.
    """
    first, second = list(tensors_of(original)), list(tensors_of(model))
    if not first:
        raise ModelError(f"the output, a {type(original).__name__}, holds no tensor to compare")
    if [tensor.shape for tensor in first] != [tensor.shape for tensor in second]:
        raise ModelError("the two networks give outputs of different shapes")
    pairs = zip(first, second, strict=True)
    lost = [(a.double() - b.double()).square().sum().item() for a, b in pairs]
    norms = references([tensor.double().square().sum().item() for tensor in first])
    if not any(norms):
        return math.sqrt(sum(lost))
    return math.sqrt(sum(map(truediv, lost, norms)) / len(norms))


def _products(model: nn.Module) -> Iterator[str]:
    """In which way each structured layer that was timed multiplies, and what both ways take."""
    for name, layer in model.named_modules():
        said = layer.said_of_products() if isinstance(layer, StructuredLinear) else None
        if said is not None:
            yield f"{name} {said}"


def _call(forward: Forward, model: nn.Module, batch: Any) -> Callable[[], Any]:
    return lambda: forward(model, batch)


def _bytes(model: nn.Module) -> int:
    tensors = (*model.parameters(), *model.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    wait(device)
    start = mark(device)
    call()
    return seconds_between(start, mark(device))


def _warm_up(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call after two that build kernels and fill caches."""
    for _ in range(2):
        call()
    return max(_seconds(call, device), 1e-9)
