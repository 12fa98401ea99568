"""Times of layers, and of what could replace them, within their network.

Alone a layer finds its weights and its input in the caches; within a network others come in
between, and more so for one form than for another. What is compared is taken in one run, moments
apart, and as a ratio: a processor that others use too may be half as fast a moment later.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from rankfold.clock import Mark, mark, seconds_between

_RUNS = (3, 9)  # of the network, after one that is not counted
_SECONDS = 0.3  # that the runs fill, if so many are enough

_LEAST = 1e-9  # seconds: no time at all counts as a little

_Seconds = dict[nn.Module, float]


def shares_inside(
    layers: Sequence[nn.Module], call: Callable[[], Any], device: torch.device
) -> dict[nn.Module, float]:
    """Of a network's time the share of each of these layers, all its calls together.

    Layers whose forward the network does not run are left out.
    """
    return _medians(
        {layer: spent / whole for layer, spent in of_layers.items()}
        for whole, of_layers, _ in _runs(layers, {}, call, device)
    )


def relative_in_place(
    forms: Mapping[nn.Module, nn.Module], call: Callable[[], Any], device: torch.device
) -> dict[nn.Module, float]:
    """What each form takes for what the network gives a layer, as a multiple of the layer's time.

    The network goes on with the layers' own outputs: weights of the forms may be any. Layers whose
    forward the network does not run are left out.
    """
    return _medians(
        {layer: spent / of_layers[layer] for layer, spent in of_forms.items()}
        for _, of_layers, of_forms in _runs(list(forms), forms, call, device)
    )


def _medians(found: Iterable[Mapping[nn.Module, float]]) -> dict[nn.Module, float]:
    series: dict[nn.Module, list[float]] = defaultdict(list)
    for one in found:
        for layer, value in one.items():
            series[layer].append(value)
    return {layer: statistics.median(values) for layer, values in series.items()}


def _runs(
    layers: Sequence[nn.Module],
    forms: Mapping[nn.Module, nn.Module],
    call: Callable[[], Any],
    device: torch.device,
) -> Iterator[tuple[float, _Seconds, _Seconds]]:
    """Seconds of each run of the network, of each layer in it, and of each form right after it."""
    of_layers: dict[nn.Module, list[Mark]] = defaultdict(list)
    of_forms: dict[nn.Module, list[Mark]] = defaultdict(list)

    def start(layer: nn.Module, _: Any) -> None:
        of_layers[layer].append(mark(device))

    def stop(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        of_layers[layer].append(mark(device))
        if layer in forms:
            of_forms[layer].append(mark(device))
            forms[layer](*args, **kwargs)
            of_forms[layer].append(mark(device))

    def once() -> tuple[float, _Seconds, _Seconds]:
        of_layers.clear()
        of_forms.clear()
        began = mark(device)
        call()
        whole = max(seconds_between(began, mark(device)), _LEAST)
        return whole, _seconds(of_layers), _seconds(of_forms)

    hooks = [layer.register_forward_pre_hook(start) for layer in layers]
    hooks += [layer.register_forward_hook(stop, with_kwargs=True) for layer in layers]
    try:
        seconds, _, _ = once()
        runs = min(max(math.ceil(_SECONDS / seconds), _RUNS[0]), _RUNS[1])
        for _ in range(runs):
            yield once()
    finally:
        for hook in hooks:
            hook.remove()


def _seconds(marks: Mapping[nn.Module, Sequence[Mark]]) -> _Seconds:
    """All calls of each layer together."""
    return {
        layer: max(sum(map(seconds_between, found[::2], found[1::2])), _LEAST)
        for layer, found in marks.items()
    }
