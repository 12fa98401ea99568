"""Times of layers within their network, beside those of the layers alone.

Alone a layer finds its weights and its input in the caches; within a network others come in
between, and more so for one form than for another. The ratio is measured at one rank of each
layer and taken for all ranks of the method.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from rankfold.clock import Mark, mark, seconds_between

_RUNS = 5  # of the network, after one that is not counted


def milliseconds_inside(
    layers: Sequence[nn.Module], call: Callable[[], Any], device: torch.device
) -> float:
    """What a network spends in these layers, as it runs."""
    clock = _Clock(device)
    hooks = [layer.register_forward_pre_hook(clock.start) for layer in layers]
    hooks += [layer.register_forward_hook(clock.stop) for layer in layers]
    return clock.median(call, hooks)


def milliseconds_in_place(
    forms: Mapping[nn.Module, nn.Module], call: Callable[[], Any], device: torch.device
) -> float:
    """What these forms take for what a network gives the layers that they could replace.

    The network goes on with the layers' own outputs: weights of the forms may be any.
    """
    clock = _Clock(device)

    def run_form(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        form = forms[layer]
        clock.start()
        form(*args, **kwargs)
        clock.stop()

    hooks = [layer.register_forward_hook(run_form, with_kwargs=True) for layer in forms]
    return clock.median(call, hooks)


class _Clock:
    """Adds up the time between each start and stop of one run of a network."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[Mark] = []

    def start(self, *_: Any) -> None:
        self.marks.append(mark(self.device))

    stop = start

    def median(self, call: Callable[[], Any], hooks: Sequence[Any]) -> float:
        """Milliseconds of a run; the hooks are removed."""
        found = []
        try:
            for _ in range(1 + _RUNS):
                self.marks = []
                call()
                pairs = zip(self.marks[::2], self.marks[1::2], strict=True)
                found.append(sum(seconds_between(start, stop) for start, stop in pairs))
        finally:
            for hook in hooks:
                hook.remove()
        return 1e3 * statistics.median(found[1:])
