"""From a trained network and a few batches to an analysis, and from that to plans."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial

from torch import nn

from rankfold.analysis.candidates import AnalysedLayer, Candidate, candidates
from rankfold.analysis.planning import Choice, choose_by_rule, choose_within_budget, layer_plan
from rankfold.analysis.survey import SurveyedLayer, survey
from rankfold.batches import Data, Forward, run
from rankfold.cost import count_layer_macs, count_parameters
from rankfold.errors import BudgetError, ModelError, RankfoldError, UnsupportedLayerError
from rankfold.methods import METHODS, WEIGHT_METRIC, Method, Spectrum
from rankfold.plan import Cost, Plan
from rankfold.progress import Progress, silent
from rankfold.ranks import energy_rank, evbmf_rank

METRICS = {"weight": WEIGHT_METRIC}


@dataclass(frozen=True)
class Analysis:
    """All that plans are made from: every layer with its candidates, and the network's costs."""

    layers: tuple[AnalysedLayer, ...]
    parameters: int
    macs: int  # of the first calibration batch
    batch_size: int  # of the first calibration batch
    metric: str

    def plan(
        self,
        *,
        params: float | None = None,
        macs: float | None = None,
        energy: float | None = None,
        fraction: float | None = None,
        evbmf: bool = False,
    ) -> Plan:
        """Choose a method and a rank for every layer, or to leave it. Takes seconds, needs no data.

        One of:

        - `params=`, `macs=`, or both: a budget for the whole network, as the fraction of the dense
          network that is *kept* (at most 1) or, above 1, as an absolute number (MACs of one
          sample). The choice with the least predicted loss is found exactly, all methods competing.
        - `energy=`: the ranks that keep this share of the energy of every unfolding.
        - `fraction=`: this fraction of full rank everywhere.
        - `evbmf=True`: the ranks above the noise, by variational Bayes (Kim et al. 2016); also what
          a call without arguments does.

        A layer that would not get cheaper stays dense. Raises BudgetError for a budget that cannot
        be reached, naming the smallest that can, and for values that make no sense.
        """
        budgets = {n: v for n, v in {"params": params, "macs": macs}.items() if v is not None}
        rules = {n: v for n, v in {"energy": energy, "fraction": fraction}.items() if v is not None}
        if bool(budgets) + len(rules) + evbmf > 1:
            raise BudgetError(
                "ask for one thing: params and macs, or one of energy, fraction and evbmf"
            )
        if budgets:
            request: dict[str, float | str] = dict(budgets)
            choices = self._within(budgets)
        else:
            request = dict(rules) or {"evbmf": "global analytic solution"}
            choices = self._by_rule(energy, fraction)
        layers = tuple(
            layer_plan(layer, choice, reason, self.batch_size)
            for layer, (choice, reason) in zip(self.layers, choices, strict=True)
        )
        saved = [
            (layer.parameters - choice.parameters, layer.macs - choice.macs)
            for layer, (choice, _) in zip(self.layers, choices, strict=True)
            if choice is not None
        ]
        return Plan(
            layers,
            before=Cost(self.parameters, round(self.macs / self.batch_size)),
            after=Cost(
                self.parameters - sum(parameters for parameters, _ in saved),
                round((self.macs - sum(count for _, count in saved)) / self.batch_size),
            ),
            metric=self.metric,
            request=request,
        )

    def _within(self, budgets: dict[str, float]) -> list[tuple[Choice, str | None]]:
        totals = {"params": self.parameters, "macs": self.macs}
        # Absolute MACs are said per sample, candidates are counted per batch.
        unit = {"params": 1, "macs": self.batch_size}
        limits = {}
        for name, value in budgets.items():
            if not 0 < value < math.inf:
                raise BudgetError(f"{name}={value} is not a budget: it must be above 0")
            limits[name] = value * (totals[name] if value <= 1 else unit[name])
        choices = choose_within_budget(self.layers, limits, totals)
        dense = "the budget is better saved elsewhere"
        nothing = "no rank is cheaper than the dense layer"
        return [
            (choice, layer.reason or (dense if layer.candidates else nothing))
            for layer, choice in zip(self.layers, choices, strict=True)
        ]

    def _by_rule(
        self, energy: float | None, fraction: float | None
    ) -> list[tuple[Choice, str | None]]:
        for name, value in {"energy": energy, "fraction": fraction}.items():
            if value is not None and not 0 < value <= 1:
                raise BudgetError(f"{name}={value} is outside (0, 1]")

        def rule(spectrum: Spectrum) -> int:
            if energy is not None:
                return energy_rank(spectrum.singular_values, energy)
            if fraction is not None:
                return max(1, round(fraction * min(spectrum.shape)))
            return max(1, evbmf_rank(spectrum.singular_values, spectrum.shape))

        return choose_by_rule(self.layers, rule)


def analyze(
    model: nn.Module,
    data: Data,
    *,
    forward: Forward = run,
    layers: str | Sequence[str] = "*",
    methods: Sequence[Method] | None = None,
    metric: str = "weight",
    batches: int = 4,
    progress: Progress = silent,
) -> Analysis:
    """Look at every layer of a trained network: what it costs, and what could replace it.

    Runs the first `batches` batches of `data` (see `rankfold.batches` for what a batch is) through
    the model in eval mode, on its own device, and fits every method to every layer that it takes.
    `layers` are names or shell-style patterns of the layers to consider; a name without a wildcard
    must be one that can be factorized. `methods` defaults to all of `METHODS`; the model is left
    as it was.

    Raises ModelError for weights that are not finite, CalibrationError for data that yields nothing
    or makes activations that are not, UnsupportedLayerError for a layer asked for by name that no
    method takes.
    """
    if metric not in METRICS:
        raise RankfoldError(f"no metric '{metric}'; there are {', '.join(METRICS)}")
    chosen = [method() for method in METHODS.values()] if methods is None else list(methods)
    patterns = [layers] if isinstance(layers, str) else list(layers)
    surveyed = survey(model, data, forward, batches, progress)
    _check_names(patterns, [layer.name for layer in surveyed.layers])
    look = partial(_analyse, methods=chosen, metric=metric, patterns=patterns)
    analysed = [look(layer) for layer in progress(surveyed.layers, "decomposing")]
    return Analysis(
        tuple(analysed), count_parameters(model), surveyed.macs, surveyed.batch_size, metric
    )


def _check_names(patterns: Sequence[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UnsupportedLayerError(
                f"no layer with a weight matches '{pattern}'; there are {', '.join(names)}"
            )


def _analyse(
    surveyed: SurveyedLayer, methods: Sequence[Method], metric: str, patterns: Sequence[str]
) -> AnalysedLayer:
    layer, name = surveyed.module, surveyed.name
    reason = surveyed.reason
    if not any(fnmatchcase(name, pattern) for pattern in patterns):
        reason = "not among the layers asked for"
    against = {method.name: method.why_not(layer) for method in methods}
    able = {method.name: method for method in methods if against[method.name] is None}
    if reason is None and not able:
        reason = "; ".join(dict.fromkeys(why for why in against.values() if why))
    if reason is not None and name in patterns:
        raise UnsupportedLayerError(f"layer '{name}' cannot be factorized: {reason}")
    parameters = count_parameters(layer)
    if reason is not None:
        return AnalysedLayer(name, repr(layer), parameters, 0, reason, {}, {}, ())
    shapes = surveyed.input_shapes
    dense = (parameters, count_layer_macs(copy.deepcopy(layer).to("meta"), shapes))
    families = {}
    found: list[Candidate] = []
    for method in able.values():
        try:
            families[method.name] = method.fit(layer, METRICS[metric])
        except ValueError as error:
            raise ModelError(f"layer '{name}': {error}") from error
        found += candidates(layer, method, families[method.name], shapes, dense)
    return AnalysedLayer(name, repr(layer), *dense, None, able, families, tuple(found))


__all__ = ["METRICS", "Analysis", "analyze"]
