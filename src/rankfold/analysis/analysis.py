"""What is known of a network before it is planned, and the plans that are made from it."""

import contextlib
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from rankfold.analysis.candidates import AnalysedLayer
from rankfold.analysis.correction import Check, agreement
from rankfold.analysis.latency import NetworkTiming
from rankfold.analysis.overrides import Overrides
from rankfold.analysis.planning import (
    COSTS,
    Choice,
    Limit,
    Objective,
    choose_by_rule,
    choose_within_budget,
    layer_plan,
    milliseconds_of,
)
from rankfold.analysis.storage import load_analysis, save_analysis
from rankfold.errors import BudgetError
from rankfold.methods import Moments, Spectrum
from rankfold.plan import Cost, Plan
from rankfold.ranks import energy_rank, evbmf_rank
from rankfold.tables import Shown, shortened

_NO_OVERRIDES = Overrides()


@dataclass(frozen=True)
class CurvePoint:
    """A budget, what the best plan within it costs, and its predicted loss."""

    budget: float
    cost: Cost
    loss: float


@dataclass(frozen=True)
class Trial:
    """A whole plan tried while the metric was chosen: its loss as predicted and as measured."""

    metric: str
    macs: float  # the budget
    predicted: float
    measured: float


@dataclass(frozen=True)
class Analysis(Shown):
    """All that plans are made from: every layer with its candidates, and the network's costs."""

    layers: tuple[AnalysedLayer, ...]
    parameters: int
    weight_bytes: int
    macs: int  # of the first calibration batch
    batch_size: int  # of the first calibration batch
    metric: str
    checks: tuple[Check, ...] = ()  # single layers replaced: predicted and measured
    trials: tuple[Trial, ...] = ()  # whole plans, in the metrics that competed
    timing: NetworkTiming | None = None

    def __rich__(self) -> Table:
        table = Table(title="analysis", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("layer", overflow="fold")
        for column in ("parameters", "MACs", *(["time"] if self.timing else [])):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("methods, or why none", overflow="fold")
        for layer in self.layers:
            cheaper = {candidate.method for candidate in layer.candidates}
            found = [name for name in layer.methods if name in cheaper]
            why = escape(layer.reason or "no rank is cheaper than the dense layer")
            time = "" if layer.timing is None else f"{layer.timing.dense_ms:.3g} ms"
            table.add_row(
                escape(layer.name) or "(the model)",
                shortened(layer.parameters),
                shortened(layer.macs / self.batch_size),
                *([time] if self.timing else []),
                ", ".join(found) or why,
            )
        table.caption = Text("\n".join(self.trust()), justify="left")
        return table

    def trust(self) -> list[str]:
        """How well predictions agreed with what was measured, in lines of text."""
        lines = [f"metric: {self.metric}"]
        for trial in self.trials:
            lines.append(
                f"  {trial.metric}, {100 * trial.macs:.0f} % of MACs: loss predicted "
                f"{trial.predicted:.3g}, measured {trial.measured:.3g}"
            )
        if self.checks:
            lines.append(
                f"  {len(self.checks)} layers replaced one by one: rank correlation of predicted "
                f"and measured loss {self.agreement:.2f}"
            )
        return lines

    @property
    def moments(self) -> dict[str, Moments]:
        """The moments of every layer that can be factorized."""
        return {layer.name: layer.moments for layer in self.layers if layer.reason is None}

    @property
    def agreement(self) -> float:
        """Spearman's rank correlation of predicted and measured losses over the checks."""
        return agreement(self.checks)

    def plan(
        self,
        *,
        params: float | None = None,
        macs: float | None = None,
        memory: float | None = None,
        latency: float | None = None,
        energy: float | None = None,
        fraction: float | None = None,
        evbmf: bool = False,
        objective: Objective = "sum",
        overrides: Overrides = _NO_OVERRIDES,
    ) -> Plan:
        """Choose a method and a rank for every layer, or to leave it. Takes seconds, needs no data.

        One of:

        - `params=`, `macs=`, `memory=` (bytes of weights), `latency=`, any of them together: a
          budget for the whole network, as the fraction of the dense network that is *kept* (at most
          1) or, above 1, as an absolute number (MACs of one sample, milliseconds of one batch). The
          choice with the least predicted loss in sum is found exactly, all methods competing; with
          `objective="max"` the one whose greatest loss of a layer is least (ALDS: Liebenwein 2021),
          `objective="product"` the one with the greatest product of the shares of energy that the
          layers keep (Zhang et al. 2016, section 2.4, there by a greedy search; in the metrics
          weight and svd-llm, whose losses are relative).
          Latency needs an analysis that was `timed`; layers that would not get faster stay dense.
        - `energy=`: the ranks that keep this share of the energy of every unfolding.
        - `fraction=`: this fraction of full rank everywhere.
        - `evbmf=True`: the ranks above the noise, by variational Bayes (Kim et al. 2016); also what
          a call without arguments does.

        `overrides` says what is settled for single layers. A layer that would not get cheaper stays
        dense. Raises BudgetError for a budget that cannot be reached, naming the smallest that can,
        and for values that make no sense; PlanError for overrides that contradict each other.
        """
        asked = {"params": params, "macs": macs, "memory": memory, "latency": latency}
        budgets = {name: value for name, value in asked.items() if value is not None}
        rules = {n: v for n, v in {"energy": energy, "fraction": fraction}.items() if v is not None}
        if bool(budgets) + len(rules) + evbmf > 1:
            raise BudgetError(
                "ask for one thing: params, macs, memory and latency, or one of energy, fraction "
                "and evbmf"
            )
        layers = overrides.apply(self.layers)
        forced = {layer.name for layer in layers if overrides.forces(layer)}
        if budgets:
            request: dict[str, float | str] = dict(budgets)
            if objective != "sum":
                request["objective"] = objective
            choices = self._within(layers, budgets, objective, forced)
        else:
            request = dict(rules) or {"evbmf": "global analytic solution"}
            choices = self._by_rule(layers, energy, fraction, forced)
        entries = tuple(
            layer_plan(layer, choice, reason, self.batch_size)
            for layer, (choice, reason) in zip(layers, choices, strict=True)
        )
        return Plan(
            entries,
            before=Cost(
                self.parameters,
                round(self.macs / self.batch_size),
                None if self.timing is None else self.timing.dense_ms,
            ),
            after=self._after(layers, [choice for choice, _ in choices]),
            metric=self.metric,
            request=request,
            moments=self.moments if self.metric != "weight" else {},
        )

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write everything that plans are made from; `Analysis.load` reads it again."""
        save_analysis(self, directory)

    @staticmethod
    def load(directory: str | os.PathLike[str]) -> "Analysis":
        """Read what `save` wrote; raises CheckpointError for anything else."""
        return load_analysis(directory)

    def preferring(self, method: str) -> "Analysis":
        """As if no other method took the layers that this one can take, by its name."""
        layers = []
        for layer in self.layers:
            only = tuple(one for one in layer.candidates if one.method == method)
            layers.append(replace(layer, candidates=only) if only else layer)
        return replace(self, layers=tuple(layers))

    def without(self, method: str) -> "Analysis":
        """As if this method, by its name, had not been tried."""
        layers = []
        for layer in self.layers:
            kept = tuple(one for one in layer.candidates if one.method != method)
            has_lost_all = bool(layer.candidates) and not kept
            reason = f"{method} alone takes it, which is left out" if has_lost_all else layer.reason
            layers.append(replace(layer, candidates=kept, reason=reason))
        return replace(self, layers=tuple(layers))

    def plans(
        self, cost: str = "macs", points: int = 20, overrides: Overrides = _NO_OVERRIDES
    ) -> list[tuple[float, Plan]]:
        """Budgets of one cost from the smallest reachable to 1, and the plans within them."""
        if cost not in COSTS or (cost == "latency" and self.timing is None):
            raise BudgetError(f"no costs by the name '{cost}' in this analysis")
        plan_within = cast(Any, self.plan)
        smallest = 1.0
        try:
            plan_within(**{cost: 1e-9}, overrides=overrides)
        except BudgetError as error:
            smallest = min(error.smallest.get(cost, 1.0), 1.0)
        found = []
        for budget in np.linspace(smallest, 1, points).tolist():
            with contextlib.suppress(BudgetError):  # the smallest, rounded down
                found.append((budget, plan_within(**{cost: budget}, overrides=overrides)))
        return found

    def curve(self, cost: str = "macs", points: int = 20) -> list[CurvePoint]:
        """The least predicted loss at budgets of one cost from the smallest reachable to 1."""
        return [
            CurvePoint(budget, plan.after, plan.loss) for budget, plan in self.plans(cost, points)
        ]

    def _after(self, layers: Sequence[AnalysedLayer], choices: Sequence[Choice]) -> Cost:
        parameters, macs, milliseconds = self.parameters, self.macs, 0.0
        for layer, choice in zip(layers, choices, strict=True):
            if choice is not None:
                parameters += choice.parameters - layer.parameters
                macs += choice.macs - layer.macs
            milliseconds += milliseconds_of(layer, choice) or 0.0
        latency = None if self.timing is None else self.timing.rest_ms + milliseconds
        return Cost(parameters, round(macs / self.batch_size), latency)

    def _limits(self, budgets: Mapping[str, float]) -> dict[str, Limit]:
        # Absolute MACs are said per sample, candidates are counted per batch.
        dense: dict[str, float] = {
            "params": self.parameters,
            "macs": self.macs,
            "memory": self.weight_bytes,
        }
        unit = {"macs": self.batch_size}
        fixed = {}
        if "latency" in budgets:
            if self.timing is None:
                raise BudgetError(
                    "a budget of latency needs measured times: analyze(..., timed=True)"
                )
            dense["latency"], fixed["latency"] = self.timing.dense_ms, self.timing.rest_ms
        limits = {}
        for name, value in budgets.items():
            if not 0 < value < math.inf:
                raise BudgetError(f"{name}={value} is not a budget: it must be above 0")
            if dense[name] == 0:
                raise BudgetError(f"{name}={value} is of a network that has none to save")
            most = value * (dense[name] if value <= 1 else unit.get(name, 1))
            limits[name] = Limit(most, dense[name], fixed.get(name))
        return limits

    def _within(
        self,
        layers: Sequence[AnalysedLayer],
        budgets: Mapping[str, float],
        objective: Objective,
        forced: Collection[str],
    ) -> list[tuple[Choice, str | None]]:
        choices = choose_within_budget(layers, self._limits(budgets), objective, forced)
        dense = "the budget is better saved elsewhere"
        nothing = "no rank is cheaper than the dense layer"
        return [
            (choice, layer.reason or (dense if layer.candidates else nothing))
            for layer, choice in zip(layers, choices, strict=True)
        ]

    def _by_rule(
        self,
        layers: Sequence[AnalysedLayer],
        energy: float | None,
        fraction: float | None,
        forced: Collection[str],
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

        return choose_by_rule(layers, rule, forced)
