"""An analysis, with the times of its layers and of what could replace them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from rankfold import processes
from rankfold.analysis.candidates import AnalysedLayer
from rankfold.analysis.latency import LayerToTime, time_network
from rankfold.analysis.survey import SurveyedLayer, survey
from rankfold.analysis.timing_cache import TimingCache
from rankfold.batches import Data, Forward, device_of, first_batches, run
from rankfold.errors import PlanError
from rankfold.methods import Rank
from rankfold.progress import Progress, silent
from rankfold.runtime import Runtime, check_runtime
from rankfold.unfusing import unfused

if TYPE_CHECKING:
    from rankfold.analysis.analysis import Analysis


def with_timings(
    analysis: "Analysis",
    model: nn.Module,
    data: Data,
    *,
    forward: Forward = run,
    runtime: Runtime = "eager",
    cache: TimingCache | None = None,
    progress: Progress = silent,
) -> "Analysis":
    """The analysis of this model with times of this device, to plan by latency from.

    On inputs of the shapes of the first batch, in the `runtime` (compiled and exported layers take
    seconds each, once: times are kept in a cache on disk, the user's by default). An analysis that
    was made elsewhere is timed here without gathering anything again. Raises PlanError if the
    model is not the one that was analysed, DeviceError for a runtime that is not installed.
    """
    check_runtime(runtime)
    with unfused(model) as opened:
        found = {layer.name: layer for layer in survey(opened, data, forward, 1).layers}
        to_time = [
            _to_time(layer, found.get(layer.name)) for layer in analysis.layers if layer.candidates
        ]
        batch = next(first_batches(data, 1, device_of(model)))
        # Of one process for all: what else runs beside them differs.
        timing, layers = processes.from_first(
            lambda: time_network(
                opened, batch, to_time, forward, cache or TimingCache(), progress, runtime
            )
        )
    timed = tuple(replace(layer, timing=layers.get(layer.name)) for layer in analysis.layers)
    return replace(analysis, layers=timed, timing=timing)


def _to_time(layer: AnalysedLayer, found: SurveyedLayer | None) -> LayerToTime:
    if found is None or repr(found.module) != layer.layer:
        raise PlanError(f"layer '{layer.name}' of the analysis, {layer.layer:.200}, is not there")
    return LayerToTime(
        layer.name,
        found.module,
        found.input_shapes,
        layer.methods,
        _ranks_by_method(layer),
        layer.reader,
    )


def _ranks_by_method(layer: AnalysedLayer) -> Mapping[str, Sequence[Rank]]:
    return {
        method: [candidate.rank for candidate in layer.candidates if candidate.method == method]
        for method in layer.methods
    }
