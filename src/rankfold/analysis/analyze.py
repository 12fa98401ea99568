"""From a trained network and a few batches to an analysis."""

import copy
import functools
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
from rankfold.analysis.candidates import AnalysedLayer, Candidate, below_break_even, grid_of
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
from rankfold.analysis.storage import pack_analysis, pack_layer, unpack_analysis, unpack_layer
from rankfold.analysis.survey import SurveyedLayer, survey
from rankfold.analysis.timing import with_timings
from rankfold.batches import Data, Forward, device_of, run, uncompiled
from rankfold.cost import count_layer_macs, count_parameters
from rankfold.errors import BudgetError, CalibrationError, ModelError, UnsupportedLayerError
from rankfold.journal import ANALYSIS, Journal, Pathlike, opened
from rankfold.memory import enough_memory_for
from rankfold.methods import (
    WEIGHT_METRIC,
    Family,
    Method,
    Methods,
    Moments,
    make_methods,
    other_kind,
    reduction,
)
from rankfold.progress import Progress, silent
from rankfold.request import beyond_defaults, request
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
# In a journal: everything, and below it the parts that it is made of.
_WHOLE, _PARTS = f"{ANALYSIS}/whole", f"{ANALYSIS}/parts"
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
    journal: Journal | Pathlike | None = None,
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
    `temperatures`) or "values" (each output tensor counts alike, and all of its places); where one
    does not matter, a `forward` leaves it out. `outputs=None` goes by how they look.
    With `loss_fn(output, label)` the gradients are those of the data's labels. The losses of all
    candidates are then corrected by the divergence that is measured when layers are replaced one by
    one (`check`), unless plans become clearly worse by it. "weight" needs no such data and corrects
    nothing. With `timed`, layers and what could replace them are timed in the `runtime` on the
    shapes of the first batch (see `with_timings`).

    What is finished is kept in the directory `journal`; where the same call was killed, it goes on
    from there, to the same analysis (but for times). Remove the directory when you have no more use
    for it.

    Raises ModelError for weights that are not finite, CalibrationError for data that yields nothing
    or makes activations that are not, UnsupportedLayerError for a layer asked for by name that no
    method takes, DeviceError, naming the layer, where memory does not suffice for one, JournalError
    for a journal of something else or that another process holds.
    """
    asked: dict[str, Any] = {
        "forward": forward,
        "layers": layers,
        "methods": methods,
        "metric": metric,
        "outputs": outputs,
        "loss_fn": loss_fn,
        "temperatures": temperatures,
        "damping": damping,
        "batches": batches,
        "held_out": held_out,
        "check": check,
        "timed": timed,
        "runtime": runtime,
        "seed": seed,
    }
    check_metric(metric)
    check_runtime(runtime)
    processes.join(device_of(model))
    if batches < 1 or held_out < 1:
        raise CalibrationError("batches and held_out must be at least 1")
    make_methods(methods)  # raises
    with opened(journal, lambda: {ANALYSIS: analysis_request(model, data, **asked)}) as book:
        analysis = book.once(
            _WHOLE,
            lambda: _analyze(model, data, asked, book, progress),
            pack_analysis,
            lambda packed: _on_device(unpack_analysis(packed), device_of(model)),
        )
        book.forget(_PARTS)
    return analysis


def analysis_request(model: nn.Module, data: Data, **settings: Any) -> dict[str, str]:
    """What an analysis depends on, as `request` tells it; the settings are those of `analyze`."""
    return request(model, {"data": data}, beyond_defaults(analyze, settings))


def _on_device(analysis: Analysis, device: torch.device) -> Analysis:
    layers = (replace(one, moments=one.moments.to(device)) for one in analysis.layers)
    return replace(analysis, layers=tuple(layers))


def _analyze(
    model: nn.Module,
    data: Data,
    asked: Mapping[str, Any],
    journal: Journal,
    progress: Progress,
) -> Analysis:
    forward, layers, metric = asked["forward"], asked["layers"], asked["metric"]
    batches = asked["batches"]
    patterns = [layers] if isinstance(layers, str) else list(layers)
    with uncompiled(), unfused(model) as opened_up:
        surveyed = survey(opened_up, data, forward, batches if metric == "weight" else 1, progress)
        _check_names(patterns, [layer.name for layer in surveyed.layers])
        chosen = make_methods(asked["methods"])
        plain = _fitting_once({one.name: one.module for one in surveyed.layers}, chosen, {})
        priced = journal.shared_out(
            _parts("layer", surveyed.layers),
            surveyed.layers,
            lambda one: _look(one, chosen, patterns, plain),
            progress,
            "decomposing",
            pack_layer,
            lambda _, packed: unpack_layer(packed),
        )
        looked = [
            _Looked(layer, one.module) for layer, one in zip(priced, surveyed.layers, strict=True)
        ]
        able = {one.layer.name: cast("Layer", one.module) for one in looked if one.layer.methods}
        calibration = None
        if metric != "weight" and able:
            calibration = calibrate(
                opened_up,
                data,
                able,
                forward=forward,
                outputs=asked["outputs"],
                loss_fn=asked["loss_fn"],
                temperatures=asked["temperatures"],
                batches=batches,
                held_out=asked["held_out"],
                seed=asked["seed"],
                journal=journal,
                name=f"{_PARTS}/statistics",
                progress=progress,
            )
        damping, check = asked["damping"], asked["check"]
        bench = _Workbench(looked, plain, surveyed.macs, calibration, damping, journal, progress)
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
            count_parameters(opened_up),
            sum(parameter.nbytes for parameter in opened_up.parameters()),
            surveyed.macs,
            surveyed.batch_size,
            fitted.metric,
            tuple(checks),
            tuple(trials),
        )
    if not asked["timed"]:
        return analysis
    runtime = asked["runtime"]
    return with_timings(analysis, model, data, forward=forward, runtime=runtime, progress=progress)


def _check_names(patterns: Sequence[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UnsupportedLayerError(
                f"no layer with a weight matches '{pattern}'; there are {', '.join(names)}"
            )


# A layer's name and a method's: what the method offers for the layer, fitted when first asked for.
_Families = Callable[[str, str], Family]


def _fitting_once(
    modules: Mapping[str, nn.Module], methods: Sequence[Method], moments: Mapping[str, Moments]
) -> _Families:
    by_name = {method.name: method for method in methods}

    @functools.cache
    def fit(layer: str, method: str) -> Family:
        with enough_memory_for(f"layer '{layer}', fitting {method}"):
            try:
                known = moments.get(layer, WEIGHT_METRIC)
                return reduction.fit(by_name[method], modules[layer], known)
            except ValueError as error:
                raise ModelError(f"layer '{layer}': {error}") from error

    return fit


@dataclass(frozen=True)
class _Looked:
    """A layer and what does not depend on the metric: the candidates, but for their losses."""

    layer: AnalysedLayer
    module: nn.Module


def _look(
    surveyed: SurveyedLayer, methods: Sequence[Method], patterns: Sequence[str], plain: _Families
) -> AnalysedLayer:
    """With all candidates, of which no loss is known: it is 0."""
    module, name = surveyed.module, surveyed.name
    reason = surveyed.reason
    if not any(fnmatchcase(name, pattern) for pattern in patterns):
        reason = "not among the layers asked for"
    # No method has to make sense of a layer that is left alone.
    asked = methods if reason is None else ()
    against = {method.name: reduction.why_not(method, module) for method in asked}
    able = {method.name: method for method in asked if against[method.name] is None}
    if reason is None and not able:
        # What the methods for its kind of layer say says more than that others are for others.
        said = [why for why in against.values() if why and why != other_kind(module)]
        reason = "; ".join(dict.fromkeys(said)) or other_kind(module)
    if reason is not None and name in patterns:
        raise UnsupportedLayerError(f"layer '{name}' cannot be factorized: {reason}")
    parameters = count_parameters(module)
    size = next(module.parameters()).element_size()
    if reason is not None:
        return AnalysedLayer(
            name, repr(module), parameters, 0, reason, {}, {}, (), {}, element_size=size
        )
    shapes = surveyed.input_shapes
    dense = (parameters, count_layer_macs(copy.deepcopy(module).to("meta"), shapes))
    families = {key: plain(name, key) for key in able}
    candidates = [
        Candidate(key, rank, 0.0, *cost)
        for key, family in families.items()
        for rank, cost in below_break_even(
            module, able[key], family.ranks(), shapes, dense, surveyed.reader
        ).items()
    ]
    return AnalysedLayer(
        name,
        repr(module),
        *dense,
        None,
        able,
        {key: tuple(family.spectra) for key, family in families.items()},
        tuple(candidates),
        {key: grid_of(family) for key, family in families.items()},
        element_size=size,
        reader=surveyed.reader,
        tied=surveyed.tied,
    )


@dataclass(frozen=True)
class _Fitted:
    """All layers fitted in one metric."""

    metric: str
    layers: list[AnalysedLayer]
    families: _Families


@dataclass(frozen=True)
class _Workbench:
    """Fits a network's layers in a metric, tries them in the network, corrects and compares."""

    looked: Sequence[_Looked]
    plain: _Families  # in the weight metric
    macs: int
    calibration: Calibration | None
    damping: float
    journal: Journal
    progress: Progress

    def fit(self, metric: str) -> _Fitted:
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
        methods = {key: method for one in self.looked for key, method in one.layer.methods.items()}
        modules = {one.layer.name: one.module for one in self.looked}
        in_metric = _fitting_once(modules, list(methods.values()), moments)

        def families(layer: str, method: str) -> Family:
            own = moments[layer]
            is_plain = own.is_plain and own.scale is None
            return (self.plain if is_plain else in_metric)(layer, method)

        def losses(one: _Looked) -> list[float]:
            name = one.layer.name
            with enough_memory_for(f"layer '{name}', in the metric {metric}"):
                return [families(name, c.method).loss(c.rank) for c in one.layer.candidates]

        every = self.journal.shared_out(
            _parts(f"fit {metric}", self.looked),
            self.looked,
            losses,
            self.progress,
            f"fitting, {metric}",
        )
        layers = [
            replace(
                one.layer,
                candidates=tuple(
                    replace(candidate, loss=loss)
                    for candidate, loss in zip(one.layer.candidates, found, strict=True)
                ),
                moments=moments[one.layer.name],
            )
            for one, found in zip(self.looked, every, strict=True)
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
        able = sum(layer.macs for layer in fitted.layers if layer.candidates)
        for share in _TRIALS:
            budget = 1 - (1 - share) * able / self.macs if able else 1.0
            try:
                choices = self._choose(fitted, budget)
            except BudgetError as error:
                budget = min(error.smallest["macs"], 1.0)
                choices = self._choose(fitted, budget)
            measured = self.journal.once(
                f"{_PARTS}/trial {fitted.metric} {share} {_told(choices)}",
                partial(self._measure, fitted, choices),
            )
            predicted = sum(choice.loss for choice in choices if choice is not None)
            found.append(Trial(fitted.metric, budget, predicted, measured))
        return found

    def _measure(self, fitted: _Fitted, choices: Sequence[Candidate | None]) -> float:
        """The divergence of the network with these choices in place."""
        assert self.calibration is not None
        modules = {one.layer.name: one.module for one in self.looked}
        forms = processes.gathered(
            {
                layer.name: fitted.families(layer.name, choice.method).build(choice.rank)
                for layer, choice in processes.own(list(zip(fitted.layers, choices, strict=True)))
                if choice is not None
            }
        )
        replacements = {modules[n]: form for some in forms for n, form in some.items()}
        return processes.from_first(partial(self.calibration.judge.divergence, replacements))

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

        def check(work: tuple[_Looked, Sequence[Candidate]]) -> list[float]:
            one, candidates = work
            measured = []
            for candidate in candidates:
                with enough_memory_for(f"layer '{one.layer.name}', checking {candidate.method}"):
                    form = fitted.families(one.layer.name, candidate.method).build(candidate.rank)
                    measured.append(judge.divergence({one.module: form}))
            return measured

        every = self.journal.shared_out(
            _parts(f"check {fitted.metric}", self.looked),
            list(zip(self.looked, points, strict=True)),
            check,
            self.progress,
            f"checking, {fitted.metric}",
        )
        return [
            Check(one.layer.name, candidate.method, candidate.rank, candidate.loss, measured)
            for one, candidates, found in zip(self.looked, points, every, strict=True)
            for candidate, measured in zip(candidates, found, strict=True)
        ]


def _parts(what: str, layers: Sequence[Any]) -> list[str]:
    """Names in a journal of what there is one of for each layer."""
    return [f"{_PARTS}/{what} {place}" for place in range(len(layers))]


def _told(choices: Sequence[Candidate | None]) -> str:
    return ", ".join("-" if c is None else f"{c.method} {c.rank}" for c in choices)


def _score(trials: Sequence[Trial]) -> float:
    """The mean logarithm of the measured divergence."""
    return sum(math.log(max(trial.measured, 1e-300)) for trial in trials) / len(trials)
