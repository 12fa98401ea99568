"""How long layers take: measured on the device that they will run on, and remembered on disk.

Multiply-accumulates are not time. Each layer, and what could replace it at a coarse grid of ranks,
is timed alone on inputs of its own shapes, in the memory format and with the threads it will run
with; between the ranks of the grid times are interpolated.
"""

import copy
import math
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
from torch import nn

from rankfold.analysis.in_context import milliseconds_in_place, milliseconds_inside
from rankfold.analysis.timing_cache import TimingCache
from rankfold.batches import Forward, device_of, run, running
from rankfold.clock import mark, seconds_between
from rankfold.cost import example_input
from rankfold.layers import TiedLayers
from rankfold.measure import latencies, with_memory_format
from rankfold.merging import planned_form
from rankfold.methods import Method, Rank
from rankfold.progress import Progress, silent
from rankfold.runtime import Runtime, caller, prepare, version_of

_GRID = {1: 6, 2: 4}  # ranks timed per entry, by the number of entries; 3 for more
_SLOW_GRID = {1: 4, 2: 3}  # where each has to be compiled or exported first
_RUNS = (5, 60)
_SECONDS = 0.04
_TIMES_IN_GRAPH = 10
_MUCH_FASTER = 0.85  # of the time in channels-last format: the network stays contiguous


@dataclass(frozen=True)
class LayerTiming:
    """Milliseconds of one layer over all its calls, dense and at a grid of ranks of each method."""

    dense_ms: float
    grids: Mapping[str, tuple[tuple[int, ...], ...]]
    tables: Mapping[str, np.ndarray]

    def of(self, method: str, ranks: Sequence[Rank]) -> np.ndarray:
        """Milliseconds of each rank, interpolated; beyond the grid those of its edge."""
        grid, table = self.grids[method], self.tables[method]
        points = np.clip(np.array(ranks, dtype=float), [e[0] for e in grid], [e[-1] for e in grid])
        # An axis of one rank alone has nothing to interpolate.
        kept = [axis for axis, entry in enumerate(grid) if len(entry) > 1]
        if not kept:
            return np.full(len(points), table.item())
        interpolate = scipy.interpolate.RegularGridInterpolator(
            [grid[axis] for axis in kept], table.squeeze()
        )
        return interpolate(points[:, kept])


@dataclass(frozen=True)
class NetworkTiming:
    """Milliseconds of the whole dense network on the first calibration batch."""

    dense_ms: float  # in its faster memory format
    rest_ms: float  # in the format of the timings, without the layers that could be replaced
    memory_format: str
    device: str
    threads: int
    runtime: Runtime = "eager"


@dataclass(frozen=True)
class LayerToTime:
    name: str
    module: nn.Module
    input_shapes: tuple[tuple[int, ...], ...]
    methods: Mapping[str, Method]
    ranks: Mapping[str, Sequence[Rank]]  # of the candidates, by method
    reader: str | None = None  # the linear layer that will take in a readout of its outputs


def time_network(
    model: nn.Module,
    batch: Any,
    layers: Sequence[LayerToTime],
    forward: Forward,
    cache: TimingCache,
    progress: Progress = silent,
    runtime: Runtime = "eager",
) -> tuple[NetworkTiming, dict[str, LayerTiming]]:
    """Time the network on the batch in eval mode, and each layer with all that could replace it.

    In channels-last format if the network has 2-D convolutions, because thin ones gain most in it,
    unless the runtime leaves no choice or the network is much slower so. The network itself is
    timed anew, layers are looked up in the cache first. In eager mode the times of the layers are
    then set right by what they and each method's forms take within the network.
    """
    device = device_of(model)
    formats = ["contiguous"]
    if runtime != "onnxruntime" and any(isinstance(m, nn.Conv2d) for m in model.modules()):
        formats.append("channels_last")
    networks = [with_memory_format(model, name) for name in formats]
    with running(networks[0]), running(networks[-1]), torch.no_grad():
        calls = [caller(network, batch, forward, runtime) for network in networks]
        whole = latencies(calls, device, progress)
        chosen = 0 if whole[0] < _MUCH_FASTER * whole[-1] else len(whole) - 1
    stopwatch = _Stopwatch(device, formats[chosen], runtime, cache)
    timings = {layer.name: stopwatch.layer(layer) for layer in progress(layers, "timing layers")}
    if runtime == "eager":
        with running(networks[chosen]), torch.no_grad():
            timings = stopwatch.within(networks[chosen], calls[chosen], layers, timings)
    inside = sum(timing.dense_ms for timing in timings.values())
    rest = max(0.0, whole[chosen] - inside)
    threads = torch.get_num_threads()
    network_timing = NetworkTiming(
        min(whole), rest, formats[chosen], device_name(device), threads, runtime
    )
    return network_timing, timings


def _ratio(inside: float, alone: float) -> float:
    """1 where nothing was measured: a network may read layers past their forward."""
    return inside / alone if inside > 0 and alone > 0 else 1.0


def device_name(device: torch.device) -> str:
    """The processor's or the accelerator's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    path = Path("/proc/cpuinfo")
    if device.type == "cpu" and path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or str(device)


@dataclass(frozen=True)
class _Stopwatch:
    device: torch.device
    memory_format: str
    runtime: Runtime
    cache: TimingCache

    def layer(self, layer: LayerToTime) -> LayerTiming:
        dtype = next(layer.module.parameters()).dtype
        dense = self._milliseconds(layer.module, layer.input_shapes, dtype)
        grids, tables = {}, {}
        for key, method in layer.methods.items():
            if not layer.ranks[key]:
                continue
            most = _GRID if self.runtime == "eager" else _SLOW_GRID
            grid = coarse_grid(layer.ranks[key], most)
            table = np.array(
                [
                    self._milliseconds(
                        planned_form(method, layer.module, rank, layer.reader),
                        layer.input_shapes,
                        dtype,
                    )
                    for rank in product(*grid)
                ]
            ).reshape([len(entry) for entry in grid])
            # Not made to grow with rank: torch runs small convolutions on a slower path than large
            # ones, so that less may well take longer.
            grids[key], tables[key] = grid, table
        return LayerTiming(dense, grids, tables)

    def within(
        self,
        network: nn.Module,
        call: Callable[[], Any],
        layers: Sequence[LayerToTime],
        timings: Mapping[str, LayerTiming],
    ) -> dict[str, LayerTiming]:
        """The times of layers alone in proportion to those within the network, form by form."""
        # Those that share a weight are in several places.
        layers = [layer for layer in layers if not isinstance(layer.module, TiedLayers)]
        places = {layer.name: network.get_submodule(layer.name) for layer in layers}
        inside = milliseconds_inside(list(places.values()), call, self.device)
        alone = sum(timings[name].dense_ms for name in places)
        of_dense = _ratio(inside, alone)
        of_methods: dict[str, float] = {}
        for key in dict.fromkeys(key for timing in timings.values() for key in timing.tables):
            forms, alone = {}, 0.0
            for layer in layers:
                timing = timings[layer.name]
                if key in timing.tables:
                    rank = tuple(entry[len(entry) // 2] for entry in timing.grids[key])
                    form = planned_form(layer.methods[key], layer.module, rank, layer.reader)
                    forms[places[layer.name]] = self._ready(form)
                    alone += timing.of(key, [rank]).item()
            inside = milliseconds_in_place(forms, call, self.device)
            of_methods[key] = _ratio(inside, alone)
        return {
            name: replace(
                timing,
                dense_ms=of_dense * timing.dense_ms,
                tables={key: of_methods[key] * table for key, table in timing.tables.items()},
            )
            for name, timing in timings.items()
        }

    def _ready(self, layer: nn.Module) -> nn.Module:
        """A copy with random weights, in the memory format that it will have."""
        ready = filled(layer, self.device)
        convolves = any(isinstance(module, nn.Conv2d) for module in ready.modules())
        return with_memory_format(ready, self.memory_format) if convolves else ready

    def _milliseconds(
        self, layer: nn.Module, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype
    ) -> float:
        return sum(shapes.count(shape) * self._one(layer, shape, dtype) for shape in set(shapes))

    def _one(self, layer: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> float:
        key = (
            f"{device_name(self.device)}, {torch.get_num_threads()} threads, "
            f"{version_of(self.runtime)}, {dtype}, {self.memory_format}, {shape}: {layer!r}"
        )
        known = self.cache.get(key)
        if known is None:
            known = self._measure(layer, shape, dtype)
            self.cache.put(key, known)
        return known

    def _measure(self, layer: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> float:
        ready = self._ready(layer)
        given = example_input(layer, shape, dtype, self.device)
        convolves = any(isinstance(module, nn.Conv2d) for module in ready.modules())
        if self.memory_format == "channels_last" and convolves and given.dim() == 4:
            given = given.to(memory_format=torch.channels_last)
        # Of a layer by itself the launch of a graph may be most.
        times = _TIMES_IN_GRAPH if self.runtime == "cuda-graph" else 1
        again = _Again(ready, times) if times > 1 else ready
        with torch.no_grad():
            return milliseconds(prepare(again, given, run, self.runtime), given) / times


class _Again(nn.Module):
    """A layer, run so many times on the same."""

    def __init__(self, layer: nn.Module, times: int) -> None:
        super().__init__()
        self.layer, self.times = layer, times

    def forward(self, given: torch.Tensor) -> Any:
        for _ in range(self.times):
            output = self.layer(given)
        return output


def coarse_grid(
    ranks: Sequence[Rank], most: Mapping[int, int] = _GRID
) -> tuple[tuple[int, ...], ...]:
    """For each entry of a rank a few of its values, the least and greatest among them."""
    grid = []
    for entry in zip(*ranks, strict=True):
        values = sorted(set(entry))
        wanted = np.geomspace(values[0], values[-1], most.get(len(ranks[0]), 3))
        nearest = {values[int(np.abs(np.array(values) - one).argmin())] for one in wanted}
        grid.append(tuple(sorted(nearest)))
    return tuple(grid)


def filled(layer: nn.Module, device: torch.device) -> nn.Module:
    """A copy of a layer of any device with random weights and zero buffers, in eval mode."""
    filled = copy.deepcopy(layer).to("meta").to_empty(device=device).eval()
    with torch.no_grad():
        for parameter in filled.parameters():
            parameter.copy_(torch.rand(parameter.shape, device=device) - 0.5)
        for buffer in filled.buffers():
            buffer.zero_()  # indices, for one: those of channels must be of some that there are
    return filled


def milliseconds(layer: nn.Module, given: torch.Tensor) -> float:
    """The lower quartile of enough runs to fill a little time, after two that are not counted.

    What else the machine does only adds to it.
    """
    device = given.device

    def intervals(runs: int) -> list[float]:
        """Seconds of each call, one given right after the other."""
        marks = [mark(device)]
        for _ in range(runs):
            layer(given)
            marks.append(mark(device))
        return [seconds_between(first, last) for first, last in pairwise(marks)]

    first = max(intervals(2)[-1], 1e-7)
    runs = min(max(math.ceil(_SECONDS / first), _RUNS[0]), _RUNS[1])
    return 1e3 * statistics.quantiles(intervals(runs), n=4)[0]
