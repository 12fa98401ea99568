"""What a few batches say of a network: moments of its layers, and a judge of its outputs."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rankfold.analysis.curvature import Curvature, Identity, Labels, Outputs, Softmax
from rankfold.analysis.divergence import Judge
from rankfold.analysis.statistics import (
    Layer,
    Statistics,
    gather,
    pack_statistics,
    unpack_statistics,
)
from rankfold.batches import Data, Forward, all_finite, device_of, first_batches, held_out_first
from rankfold.errors import CalibrationError
from rankfold.journal import Journal
from rankfold.progress import Progress

_NO_JOURNAL = Journal()


@dataclass(frozen=True)
class Calibration:
    statistics: Mapping[str, Statistics]  # by layer
    judge: Judge
    curvatures: tuple[str, ...]  # that were gathered for at least one layer
    passes: int  # through the network, forward or backward, that gathering took


def calibrate(
    model: nn.Module,
    data: Data,
    layers: Mapping[str, Layer],
    *,
    forward: Forward,
    outputs: Outputs | None,
    loss_fn: Callable[[Any, Any], torch.Tensor] | None,
    temperatures: Sequence[float],
    batches: int,
    held_out: int,
    seed: int,
    journal: Journal = _NO_JOURNAL,
    name: str = "statistics",
    progress: Progress,
) -> Calibration:
    """Go once through batches of the data: those held out first, then the others.

    Of a sequence they come from all over it, of other data they are the first. Raises
    CalibrationError for data that yields nothing, or batches, activations or gradients that are not
    finite; ModelError for a model that does not run. The statistics are kept in the journal, under
    the name.
    """
    ordered, kept, count = held_out_first(data, batches, held_out)
    stream = _finite(first_batches(ordered, kept + count, device_of(model)))
    held = list(itertools.islice(stream, kept))
    if kept == 0:  # a single batch serves for both
        held = list(stream)
        stream = iter(held)
    judge = Judge.of(model, forward, held, outputs)
    curvatures: list[Curvature] = [Identity()]
    if loss_fn is not None:
        curvatures = [Labels(loss_fn)]
    elif judge.kind == "logits":
        curvatures = [*(Softmax(temperature) for temperature in temperatures), Identity()]

    def gather_all() -> dict[str, Statistics]:
        work = progress(stream, "gathering moments", count)
        return gather(model, layers, work, forward, curvatures, expected=count, seed=seed)

    statistics = journal.once(name, gather_all, pack_statistics, unpack_statistics)
    gathered = {name for one in statistics.values() for name in one.gradients}
    names = tuple(curvature.name for curvature in curvatures if curvature.name in gathered)
    return Calibration(statistics, judge, names, count * (1 + len(curvatures)))


def _finite(batches: Iterator[Any]) -> Iterator[Any]:
    for index, batch in enumerate(batches):
        if not all_finite(batch):
            raise CalibrationError(f"batch {index} of the data holds NaN or infinity")
        yield batch
