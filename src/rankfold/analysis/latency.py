"""How long layers take: measured on the device that they will run on, and remembered on disk.

Multiply-accumulates are not time. Each layer, and what could replace it at a coarse grid of ranks,
is timed on inputs of its own shapes, in the memory format and with the threads it will run with, in
its network where that can be; between the ranks of the grid times are interpolated.
"""

import platform
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import scipy
import torch
from torch import nn

from rankfold.analysis.alone import filled, milliseconds
from rankfold.analysis.in_context import relative_in_place, shares_inside
from rankfold.analysis.timing_cache import TimingCache
from rankfold.batches import Forward, device_of, run, running
from rankfold.cost import example_input
from rankfold.layers import TiedLayers
from rankfold.measure import latencies, with_memory_format
from rankfold.merging import planned_form
from rankfold.methods import Method, Rank
from rankfold.progress import Progress, silent
from rankfold.runtime import Runtime, caller, prepare, version_of

_GRID = {1: 6, 2: 4}  # ranks timed per entry, by the number of entries; 3 for more
_SLOW_GRID = {1: 4, 2: 3}  # where each has to be compiled or exported first
_BLOCK = 32  # of a rank: what processors take at once
_TIMES_IN_GRAPH = 10
_MUCH_FASTER = 0.85  # of the time in channels-last format: the network stays contiguous


@dataclass(frozen=True)
class LayerTiming:
    """Milliseconds of one layer over all its calls, dense and at a grid of ranks of each method."""

    dense_ms: float
    grids: Mapping[str, tuple[tuple[int, ...], ...]]
    tables: Mapping[str, np.ndarray]

    def of(self, method: str, ranks: Sequence[Rank]) -> np.ndarray:
        """Milliseconds of each rank, interpolated; beyond the grid those of its edge.

        Of a rank above 32 that is no multiple of it, those of the next multiple: products are made
        in blocks, and what fills its last block in part takes as long.
        """
        grid, table = self.grids[method], self.tables[method]
        points = np.array(ranks, dtype=float)
        points = np.where(points > _BLOCK, _BLOCK * np.ceil(points / _BLOCK), points)
        points = np.clip(points, [entry[0] for entry in grid], [entry[-1] for entry in grid])
        # An axis of one rank alone has nothing to interpolate.
        kept = [axis for axis, entry in enumerate(grid) if len(entry) > 1]
        if not kept:
            return np.full(len(points), table.item())
        interpolate = scipy.interpolate.RegularGridInterpolator(
            [grid[axis] for axis in kept], table.squeeze()
        )
        return interpolate(points[:, kept])

    def times(self, factor: float) -> "LayerTiming":
        """All of it longer or shorter by this factor."""
        tables = {method: factor * table for method, table in self.tables.items()}
        return LayerTiming(factor * self.dense_ms, self.grids, tables)


def _within(left_ms: float, alone: Mapping[str, LayerTiming]) -> dict[str, LayerTiming]:
    """Times of layers by themselves, all shortened alike to what their network has left for them.

    By itself a layer is also handed its input and asked for its output, between which and the next
    layer's a network has nothing to do: together they may take longer than the network that they
    are in, and then nothing would seem to make it faster.
    """
    together = sum(timing.dense_ms for timing in alone.values())
    share = left_ms / together if together > left_ms > 0 else 1.0
    return {name: timing.times(share) for name, timing in alone.items()}


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
    timed anew, layers are looked up in the cache first. In eager mode layers are timed where they
    are in the network, and what could replace them beside them; by themselves in other runtimes,
    and where the network does not run them as modules.
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
    stopwatch = _Stopwatch(device, formats[chosen], runtime, cache, progress)
    timings: dict[str, LayerTiming] = {}
    if runtime == "eager":
        with running(networks[chosen]), torch.no_grad():
            timings = stopwatch.inside(networks[chosen], calls[chosen], whole[chosen], layers)
    others = [layer for layer in layers if layer.name not in timings]
    alone = {layer.name: stopwatch.alone(layer) for layer in progress(others, "timing layers")}
    left = whole[chosen] - sum(timing.dense_ms for timing in timings.values())
    timings |= _within(left, alone)
    inside = sum(timing.dense_ms for timing in timings.values())
    rest = max(0.0, whole[chosen] - inside)
    threads = torch.get_num_threads()
    network_timing = NetworkTiming(
        min(whole), rest, formats[chosen], device_name(device), threads, runtime
    )
    return network_timing, timings


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
class _Forms:
    """What could replace a layer: of each method all forms of a coarse grid of ranks, in order."""

    grids: Mapping[str, tuple[tuple[int, ...], ...]]
    of_methods: Mapping[str, Sequence[nn.Module]]

    @staticmethod
    def of(layer: LayerToTime, most: Mapping[int, int]) -> "_Forms":
        grids = {key: coarse_grid(ranks, most) for key, ranks in layer.ranks.items() if ranks}
        forms = {
            key: [
                planned_form(layer.methods[key], layer.module, rank, layer.reader)
                for rank in product(*grid)
            ]
            for key, grid in grids.items()
        }
        return _Forms(grids, forms)

    def timed(self, dense_ms: float, milliseconds: Callable[[nn.Module], float]) -> LayerTiming:
        # Not made to grow with rank: torch runs small convolutions on a slower path than large
        # ones, so that less may well take longer.
        tables = {
            key: np.reshape(
                [milliseconds(form) for form in self.of_methods[key]],
                [len(entry) for entry in grid],
            )
            for key, grid in self.grids.items()
        }
        return LayerTiming(dense_ms, self.grids, tables)


@dataclass(frozen=True)
class _Stopwatch:
    device: torch.device
    memory_format: str
    runtime: Runtime
    cache: TimingCache
    progress: Progress

    def alone(self, layer: LayerToTime) -> LayerTiming:
        """By itself, on inputs of its shapes."""
        dtype = next(layer.module.parameters()).dtype

        def milliseconds(module: nn.Module) -> float:
            shapes = Counter(layer.input_shapes).items()
            return sum(calls * self._one(module, shape, dtype) for shape, calls in shapes)

        forms = _Forms.of(layer, _GRID if self.runtime == "eager" else _SLOW_GRID)
        return forms.timed(milliseconds(layer.module), milliseconds)

    def inside(
        self,
        network: nn.Module,
        call: Callable[[], Any],
        whole_ms: float,
        layers: Sequence[LayerToTime],
    ) -> dict[str, LayerTiming]:
        """In the network, of the layers that it runs; layers that are alike, once for all."""
        # Those that share a weight are in several places.
        layers = [layer for layer in layers if not isinstance(layer.module, TiedLayers)]
        places = {layer.name: network.get_submodule(layer.name) for layer in layers}
        shares = shares_inside(list(places.values()), call, self.device)
        kinds: dict[object, list[LayerToTime]] = defaultdict(list)
        for layer in layers:
            if places[layer.name] in shares:
                kinds[repr(layer.module), layer.input_shapes].append(layer)
        forms = {layer.name: _Forms.of(layer, _GRID) for alike in kinds.values() for layer in alike}
        multiples = self._in_place(
            {
                places[alike[0].name]: {
                    self._key(form, alike[0]): form
                    for layer in alike
                    for of_method in forms[layer.name].of_methods.values()
                    for form in of_method
                }
                for alike in kinds.values()
            },
            call,
        )

        def timing(layer: LayerToTime, dense_ms: float) -> LayerTiming:
            # A network that draws which layers it runs may have left one out: no gain is known.
            return forms[layer.name].timed(
                dense_ms, lambda form: dense_ms * multiples.get(self._key(form, layer), 1.0)
            )

        return {
            layer.name: timing(layer, whole_ms * fmean(shares[places[one.name]] for one in alike))
            for alike in kinds.values()
            for layer in alike
        }

    def _in_place(
        self, forms: Mapping[nn.Module, Mapping[str, nn.Module]], call: Callable[[], Any]
    ) -> dict[str, float]:
        """What forms take beside layers of the network, as multiples of them; by their keys."""
        found: dict[str, float] = {}
        missing: dict[nn.Module, list[str]] = {}
        for layer, keys in forms.items():
            known = {key: self.cache.get(key) for key in keys}
            found |= {key: multiple for key, multiple in known.items() if multiple is not None}
            missing[layer] = [key for key, multiple in known.items() if multiple is None]
        # One form of each layer in a run: a second would find its input in the nearest cache.
        rounds = max(map(len, missing.values()), default=0)
        for place in self.progress(range(rounds), "timing layers"):
            now = {layer: keys[place] for layer, keys in missing.items() if place < len(keys)}
            ready = {layer: self._ready(forms[layer][key]) for layer, key in now.items()}
            for layer, multiple in relative_in_place(ready, call, self.device).items():
                self.cache.put(now[layer], multiple)
                found[now[layer]] = multiple
        return found

    def _key(self, form: nn.Module, layer: LayerToTime) -> str:
        dtype = next(layer.module.parameters()).dtype
        shapes = dict(Counter(layer.input_shapes))
        return f"{self._setting(dtype)}, {shapes}: {form!r} in place of {layer.module!r}"

    def _setting(self, dtype: torch.dtype) -> str:
        """All that a time depends on but the layer and its inputs."""
        return (
            f"{device_name(self.device)}, {torch.get_num_threads()} threads, "
            f"{version_of(self.runtime)}, {dtype}, {self.memory_format}"
        )

    def _ready(self, layer: nn.Module) -> nn.Module:
        """A copy with random weights, in the memory format that it will have."""
        ready = filled(layer, self.device)
        convolves = any(isinstance(module, nn.Conv2d) for module in ready.modules())
        return with_memory_format(ready, self.memory_format) if convolves else ready

    def _one(self, layer: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> float:
        """Milliseconds of one call."""
        key = f"{self._setting(dtype)}, {shape}: {layer!r}"
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
    """For each entry of a rank a few of its values, the least and greatest among them.

    Those in between are at most 32 or multiples of it, if there are such: from one to the next
    times rise evenly.
    """
    grid = []
    for entry in zip(*ranks, strict=True):
        values = sorted(set(entry))
        inner = [value for value in values if value <= _BLOCK or value % _BLOCK == 0] or values
        wanted = np.geomspace(values[0], values[-1], most.get(len(ranks[0]), 3))[1:-1]
        nearest = {inner[int(np.abs(np.array(inner) - one).argmin())] for one in wanted}
        grid.append(tuple(sorted(nearest | {values[0], values[-1]})))
    return tuple(grid)
