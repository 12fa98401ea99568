"""The plans that could have been made: what each budget would cost, and lose, layer by layer."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from rankfold.analysis import AnalysedLayer, Analysis, Overrides
from rankfold.analysis.correction import Check
from rankfold.documents import read
from rankfold.errors import PlanError
from rankfold.plan import Cost, LayerPlan

_NO_OVERRIDES = Overrides()
_MOST_VALUES = 64  # of a spectrum


@dataclass(frozen=True)
class Option:
    """What can become of a layer; no method: it stays dense."""

    method: str | None
    rank: tuple[int, ...]
    cost: Cost
    loss: float


@dataclass(frozen=True)
class LayerOutlook:
    """The options of a layer that some budget takes, and how its weight's energy is spread."""

    name: str
    options: tuple[Option, ...]
    spectrum: tuple[float, ...]  # singular values over the greatest, evenly picked; none: unknown


@dataclass(frozen=True)
class Point:
    """A budget, what the best plan within it costs and is predicted to lose, and its options."""

    budget: float  # share of the dense cost
    cost: Cost
    loss: float
    options: tuple[int, ...]  # of each layer, by place


@dataclass(frozen=True)
class Outlook:
    """Plans from the smallest reachable budget of each kind of cost to the dense network."""

    layers: tuple[LayerOutlook, ...]
    curves: Mapping[str, tuple[Point, ...]]  # by "macs", "params", "latency"
    checks: tuple[Check, ...]  # single layers replaced: predicted and measured

    def to_json(self) -> dict[str, Any]:
        """The outlook as JSON primitives."""
        return asdict(self)

    @staticmethod
    def from_json(document: Any) -> "Outlook":
        """The outlook of a JSON document; raises PlanError for anything else."""
        outlook = read(Outlook, document, "outlook")
        for cost, points in outlook.curves.items():
            for point in points:
                if len(point.options) != len(outlook.layers) or not all(
                    0 <= place < len(layer.options)
                    for place, layer in zip(point.options, outlook.layers, strict=True)
                ):
                    raise PlanError(f"outlook: {cost:.80}: a point of options that are not there")
        return outlook


def look_ahead(
    analysis: Analysis, *, points: int = 24, overrides: Overrides = _NO_OVERRIDES
) -> Outlook:
    """The plans of an analysis at budgets of MACs, parameters and, if it is timed, latency."""
    options: list[dict[Option, int]] = [{} for _ in analysis.layers]
    curves = {}
    for cost in ("macs", "params", *(["latency"] if analysis.timing is not None else [])):
        curves[cost] = tuple(_curve(analysis, cost, points, overrides, options))
    layers = tuple(
        LayerOutlook(layer.name, tuple(own), _spectrum(layer))
        for layer, own in zip(analysis.layers, options, strict=True)
    )
    return Outlook(layers, curves, analysis.checks)


def _curve(
    analysis: Analysis,
    cost: str,
    points: int,
    overrides: Overrides,
    options: Sequence[dict[Option, int]],
) -> list[Point]:
    found: list[Point] = []
    for budget, plan in analysis.plans(cost, points, overrides):
        places = tuple(
            own.setdefault(_option(entry), len(own))
            for own, entry in zip(options, plan.layers, strict=True)
        )
        if not found or found[-1].options != places:
            found.append(Point(budget, plan.after, plan.loss, places))
    return found


def _option(entry: LayerPlan) -> Option:
    return Option(entry.method, entry.rank or (), entry.after, entry.loss)


def _spectrum(layer: AnalysedLayer) -> tuple[float, ...]:
    """Of the weight's first unfolding by the first method that has one."""
    for spectra in layer.spectra.values():
        values = spectra[0].singular_values.double().cpu() if spectra else torch.empty(0)
        if values.numel() and values[0] > 0:
            count = min(len(values), _MOST_VALUES)
            places = torch.linspace(0, len(values) - 1, count).round().long()
            return tuple((values[places] / values[0]).tolist())
    return ()
