"""From a trained network and a few batches to an analysis."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from rankfold import processes
from rankfold.analysis.analysis import Analysis, Trial
from rankfold.analysis.calibration import Calibration, calibrate
from rankfold.analysis.candidates import AnalysedLayer, Candidate, Counts, below_break_even, grid_of
from rankfold.analysis.correction import (
    Check,
    corrected,
    points_to_check,
    spread,
    typical_factor,
)
from rankfold.analysis.curvature import Outputs
from rankfold.analysis.metrics import (
    DAMPING,
    check_metric,
    competing,
    moments_of,
    typical_scale,
)
from rankfold.analysis.planning import Limit, choose_within_budget
from rankfold.analysis.statistics import Layer
from rankfold.analysis.survey import SurveyedLayer, survey
from rankfold.analysis.timing import with_timings
from rankfold.batches import Data, Forward, device_of, run
from rankfold.cost import count_layer_macs, count_parameters
from rankfold.errors import BudgetError, CalibrationError, ModelError, UnsupportedLayerError
from rankfold.methods import (
    WEIGHT_METRIC,
    Family,
    Method,
    Methods,
    Moments,
    Rank,
    make_methods,
    other_kind,
    reduction,
)
from rankfold.progress import Progress, silent
from rankfold.runtime import Runtime, check_runtime
from rankfold.unfusing import unfused

# Shares of the MACs of the layers that can be factorized at which the metrics compete.
_TRIALS = (0.5, 0.25)
# Of the metrics that compete, so many are tried again with corrected losses.
_FINALISTS = 2
# Unless the second's mean logarithm of the measured divergence is greater by this.
_CLEARLY_WORSE = 0.3
# Means of two plans that differ by less are taken for equal.
_NOISE = 0.1
# All checks together take so many times the passes of gathering at most.
_CHECK_PASSES = 4


def analyze(
    model: nn.Module,
    data: Data,
    *,
    forward: Forward = run,
    layers: str | Sequence[str] = "*",
    methods: Methods | None = None,
    metric: str = "auto",
    outputs: Outputs | None = None,
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
    temperatures: Sequence[float] = (1.0, 4.0),
    damping: float = DAMPING,
    batches: int = 16,
    held_out: int = 4,
    check: bool = True,
    timed: bool = False,
    runtime: Runtime = "eager",
    seed: int = 0,
    progress: Progress = silent,
) -> Analysis:
    """Look at every layer of a trained network: what it costs, and what could replace it.

    Runs the model in eval mode, on its own device, on batches of `data` (see `rankfold.batches` for
    what a batch is), from all over a sequence or else the first: `held_out` of them are kept to
    check predictions on, `batches` give the moments of the inputs and of the gradients. Of data
    with fewer, a fifth is held out; a single batch serves for both. Costs are those of the first.
    `layers` are names or shell-style patterns of the layers to consider; a name without a wildcard
    must be one that can be factorized. `methods` are names of `METHODS`, or methods themselves, in
    the order in which a rule prefers them; "all" for all of them, which takes longer; by default
    `DEFAULT_METHODS`. The model is left as it was.

    `metric` says what an error of a weight costs (`rankfold.analysis.metrics` has the names). For
    "auto" the network is factorized at two budgets in each that competes, and the one whose outputs
    are nearest to the original's on the held-out batches is taken. The curvature of the outputs
    needs no labels: they are "logits" (labels drawn from the model's own softmax, at each of the
    `temperatures`) or "values" (all outputs count the same); `outputs=None` goes by how they look.
    With `loss_fn(output, label)` the gradients are those of the data's labels. The losses of all
    candidates are then corrected by the divergence that is measured when layers are replaced one by
    one (`check`), unless plans become clearly worse by it. "weight" needs no such data and corrects
    nothing. With `timed`, layers and what could replace them are timed in the `runtime` on the
    shapes of the first batch (see `with_timings`).

    Raises ModelError for weights that are not finite, CalibrationError for data that yields nothing
    or makes activations that are not, UnsupportedLayerError for a layer asked for by name that no
    method takes.
    """
    check_metric(metric)
    check_runtime(runtime)
    processes.join(device_of(model))
    if batches < 1 or held_out < 1:
        raise CalibrationError("batches and held_out must be at least 1")
    chosen = make_methods(methods)
    patterns = [layers] if isinstance(layers, str) else list(layers)
    with unfused(model) as opened:
        surveyed = survey(opened, data, forward, batches if metric == "weight" else 1, progress)
        _check_names(patterns, [layer.name for layer in surveyed.layers])
        looked = _look_at_all(surveyed.layers, chosen, patterns, progress)
        able = {one.layer.name: cast("Layer", one.module) for one in looked if one.layer.methods}
        calibration = None
        if metric != "weight" and able:
            calibration = calibrate(
                opened,
                data,
                able,
                forward=forward,
                outputs=outputs,
                loss_fn=loss_fn,
                temperatures=temperatures,
                batches=batches,
                held_out=held_out,
                seed=seed,
                progress=progress,
            )
        bench = _Workbench(looked, surveyed.macs, calibration, damping, progress)
        checks: list[Check] = []
        trials: list[Trial] = []
        if calibration is None:
            fitted = bench.fit("weight")
        elif metric != "auto":
            fitted = bench.fit(metric)
            if check:
                fitted, checks = bench.correct(fitted)
        else:
            fitted, checks, trials = bench.compete(check)
        analysis = Analysis(
            tuple(fitted.layers),
            count_parameters(opened),
            sum(parameter.nbytes for parameter in opened.parameters()),
            surveyed.macs,
            surveyed.batch_size,
            fitted.metric,
            tuple(checks),
            tuple(trials),
        )
    if not timed:
        return analysis
    return with_timings(analysis, model, data, forward=forward, runtime=runtime, progress=progress)


def _check_names(patterns: Sequence[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UnsupportedLayerError(
                f"no layer with a weight matches '{pattern}'; there are {', '.join(names)}"
            )


@dataclass(frozen=True)
class _Looked:
    """A layer and what does not depend on the metric."""

    layer: AnalysedLayer  # without candidates
    module: nn.Module
    plain: Mapping[str, Family]  # by method, in the weight metric
    costs: Mapping[str, Mapping[Rank, Counts]]  # by method, below break-even


def _look_at_all(
    surveyed: Sequence[SurveyedLayer],
    methods: Sequence[Method],
    patterns: Sequence[str],
    progress: Progress,
) -> list[_Looked]:
    """Every layer, each decomposed by one process; the others know what came of it."""
    mine: dict[str, _Looked] = {}

    def look(one: SurveyedLayer) -> AnalysedLayer:
        mine[one.name] = _look(one, methods, patterns)
        return mine[one.name].layer

    layers = processes.shared_out(surveyed, look, progress, "decomposing")
    return [
        mine.get(one.name, _Looked(layer, one.module, {}, {}))
        for one, layer in zip(surveyed, layers, strict=True)
    ]


def _look(surveyed: SurveyedLayer, methods: Sequence[Method], patterns: Sequence[str]) -> _Looked:
    module, name = surveyed.module, surveyed.name
    reason = surveyed.reason
    if not any(fnmatchcase(name, pattern) for pattern in patterns):
        reason = "not among the layers asked for"
    against = {method.name: reduction.why_not(method, module) for method in methods}
    able = {method.name: method for method in methods if against[method.name] is None}
    if reason is None and not able:
        # What the methods for its kind of layer say says more than that others are for others.
        said = [why for why in against.values() if why and why != other_kind(module)]
        reason = "; ".join(dict.fromkeys(said)) or other_kind(module)
    if reason is not None and name in patterns:
        raise UnsupportedLayerError(f"layer '{name}' cannot be factorized: {reason}")
    parameters = count_parameters(module)
    size = next(module.parameters()).element_size()
    if reason is not None:
        layer = AnalysedLayer(
            name, repr(module), parameters, 0, reason, {}, {}, (), {}, element_size=size
        )
        return _Looked(layer, module, {}, {})
    shapes = surveyed.input_shapes
    dense = (parameters, count_layer_macs(copy.deepcopy(module).to("meta"), shapes))
    plain = {key: _fit(method, surveyed, WEIGHT_METRIC) for key, method in able.items()}
    layer = AnalysedLayer(
        name,
        repr(module),
        *dense,
        None,
        able,
        {key: tuple(family.spectra) for key, family in plain.items()},
        (),
        {key: grid_of(family) for key, family in plain.items()},
        element_size=size,
        reader=surveyed.reader,
        tied=surveyed.tied,
    )
    costs = {
        key: below_break_even(module, able[key], family.ranks(), shapes, dense, surveyed.reader)
        for key, family in plain.items()
    }
    return _Looked(layer, module, plain, costs)


def _fit(method: Method, layer: SurveyedLayer | _Looked, moments: Moments) -> Family:
    try:
        return reduction.fit(method, layer.module, moments)
    except ValueError as error:
        name = layer.name if isinstance(layer, SurveyedLayer) else layer.layer.name
        raise ModelError(f"layer '{name}': {error}") from error


@dataclass(frozen=True)
class _Fitted:
    """All layers fitted in one metric."""

    metric: str
    layers: list[AnalysedLayer]
    families: Mapping[tuple[str, str], Family]  # by layer and method; those fitted here


@dataclass(frozen=True)
class _Workbench:
    """Fits a network's layers in a metric, tries them in the network, corrects and compares."""

    looked: Sequence[_Looked]
    macs: int
    calibration: Calibration | None
    damping: float
    progress: Progress

    def fit(self, metric: str) -> _Fitted:
        families: dict[tuple[str, str], Family] = {}
        typical = None
        if self.calibration is not None:
            typical = typical_scale(metric, self.calibration.statistics.values())
        moments = {}
        for one in self.looked:
            statistics = None
            if self.calibration is not None:
                statistics = self.calibration.statistics.get(one.layer.name)
            found = moments_of(metric, statistics, self.damping, typical)
            moments[one.layer.name] = found.to(next(one.module.parameters()).device)

        def fit(one: _Looked) -> tuple[Candidate, ...]:
            candidates: list[Candidate] = []
            own = moments[one.layer.name]
            for key, method in one.layer.methods.items():
                if not one.costs[key]:  # none of its ranks pays
                    continue
                is_plain = own.is_plain and own.scale is None
                family = one.plain[key] if is_plain else _fit(method, one, own)
                families[one.layer.name, key] = family
                candidates += [
                    Candidate(key, rank, family.loss(rank), *cost)
                    for rank, cost in one.costs[key].items()
                ]
            return tuple(candidates)

        every = processes.shared_out(self.looked, fit, self.progress, f"fitting, {metric}")
        layers = [
            replace(one.layer, candidates=candidates, moments=moments[one.layer.name])
            for one, candidates in zip(self.looked, every, strict=True)
        ]
        return _Fitted(metric, layers, families)

    def correct(self, fitted: _Fitted) -> tuple[_Fitted, list[Check]]:
        """With losses that agree with what the checks measure."""
        checks = self._check(fitted)
        typical = typical_factor(checks)
        layers = [
            replace(
                layer,
                candidates=tuple(
                    corrected(
                        layer.candidates, [c for c in checks if c.layer == layer.name], typical
                    )
                ),
            )
            for layer in fitted.layers
        ]
        return replace(fitted, layers=layers), checks

    def compete(self, check: bool) -> tuple[_Fitted, list[Check], list[Trial]]:
        """The metric whose plans come nearest to the original on the held-out batches."""
        assert self.calibration is not None
        trials: list[Trial] = []
        leaders: list[tuple[float, _Fitted]] = []
        for metric in competing(self.calibration.curvatures):
            fitted = self.fit(metric)
            tried = self._try(fitted)
            trials += tried
            leaders = sorted([*leaders, (_score(tried), fitted)], key=lambda one: one[0])
            del leaders[_FINALISTS:]
        if not check:
            return leaders[0][1], [], trials
        finals = []
        for score, fitted in leaders:
            if score > leaders[0][0] + _CLEARLY_WORSE:
                continue
            corrected_fit, checks = self.correct(fitted)
            tried = self._try(corrected_fit)
            trials += [replace(trial, metric=f"{fitted.metric}, corrected") for trial in tried]
            # What each layer alone was measured to lose says more than two plans within noise.
            finals += [(score + _NOISE, fitted, checks), (_score(tried), corrected_fit, checks)]
        _, best, checks = min(finals, key=lambda final: final[0])
        return best, checks, trials

    def _try(self, fitted: _Fitted) -> list[Trial]:
        """Whole plans, predicted and measured."""
        assert self.calibration is not None
        found = []
        modules = {one.layer.name: one.module for one in self.looked}
        able = sum(layer.macs for layer in fitted.layers if layer.candidates)
        for share in _TRIALS:
            budget = 1 - (1 - share) * able / self.macs
            try:
                choices = self._choose(fitted, budget)
            except BudgetError as error:
                budget = min(error.smallest["macs"], 1.0)
                choices = self._choose(fitted, budget)
            taken = [(n, c) for n, c in zip(fitted.layers, choices, strict=True) if c is not None]
            forms = processes.gathered(
                {
                    layer.name: fitted.families[layer.name, choice.method].build(choice.rank)
                    for layer, choice in taken
                    if (layer.name, choice.method) in fitted.families
                }
            )
            replacements = {modules[n]: form for some in forms for n, form in some.items()}
            judge = self.calibration.judge
            measured = processes.from_first(partial(judge.divergence, replacements))
            predicted = sum(choice.loss for _, choice in taken)
            found.append(Trial(fitted.metric, budget, predicted, measured))
        return found

    def _choose(self, fitted: _Fitted, budget: float) -> list[Candidate | None]:
        return choose_within_budget(fitted.layers, {"macs": Limit(budget * self.macs, self.macs)})

    def _check(self, fitted: _Fitted) -> list[Check]:
        """A few candidates of each layer in its place, the other layers as they are.

        On as many batches as let all checks together take no more passes than gathering did; a
        batch each is the least, and where that were many times more, so many points are left out.
        """
        assert self.calibration is not None
        points = [points_to_check(layer.candidates, layer.macs) for layer in fitted.layers]
        passes = self.calibration.passes
        points = spread(points, _CHECK_PASSES * passes)
        judge = self.calibration.judge.first(passes // max(1, sum(map(len, points))))

        def check(work: tuple[_Looked, Sequence[Candidate]]) -> list[Check]:
            one, candidates = work
            found = []
            for candidate in candidates:
                form = fitted.families[one.layer.name, candidate.method].build(candidate.rank)
                measured = judge.divergence({one.module: form})
                about = (candidate.method, candidate.rank, candidate.loss)
                found.append(Check(one.layer.name, *about, measured))
            return found

        work = list(zip(self.looked, points, strict=True))
        checks = processes.shared_out(work, check, self.progress, f"checking, {fitted.metric}")
        return [one for found in checks for one in found]


def _score(trials: Sequence[Trial]) -> float:
    """The mean logarithm of the measured divergence."""
    return sum(math.log(max(trial.measured, 1e-300)) for trial in trials) / len(trials)
