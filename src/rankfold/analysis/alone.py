"""Times of layers by themselves, on inputs that they could be given."""

import copy
import math
import statistics
from itertools import pairwise

import torch
from torch import nn

from rankfold.clock import mark, seconds_between

_RUNS = (5, 60)
_SECONDS = 0.04  # that the runs fill, if so many are enough


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
