"""A plan: for each layer of a network a method and a rank, or the reason to leave it.

Plans are data. They are written to and read from JSON, and one that comes from a file can name
only methods of `METHODS`, with ranks that `factorize` bounds by the dense layer.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from rankfold.documents import check_tame, read_json
from rankfold.errors import PlanError
from rankfold.methods import METHODS, Method, Moments, Rank
from rankfold.tables import Shown, shortened

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Cost:
    """What a network, or one layer of it, costs."""

    parameters: int
    macs: int  # of one sample
    latency_ms: float | None = None  # of one batch, as predicted from measured layers; or unknown


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer: a method with its settings and a rank, or a reason."""

    name: str
    layer: str  # repr of the dense layer; a plan fits only this
    before: Cost
    after: Cost
    method: str | None = None
    settings: Mapping[str, Any] | None = None
    rank: Rank | None = None
    loss: float = 0.0
    reason: str | None = None
    reader: str | None = None  # the linear layer that takes in a readout, if the form has one
    tied: tuple[str, ...] = ()  # layers with the same weight, factorized with it, their factors too

    def make_method(self) -> Method:
        """The method with its settings; raises PlanError if there is no such method or setting."""
        try:
            return METHODS[self.method or ""](**(self.settings or {}))
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(
                f"layer '{self.name}': no method '{self.method}' with settings "
                f"{self.settings!r:.120}; there are {', '.join(METHODS)}"
            ) from error


@dataclass(frozen=True)
class Plan(Shown):
    """One entry per layer with weights, and the cost of the whole network before and after."""

    layers: tuple[LayerPlan, ...]
    before: Cost
    after: Cost
    metric: str
    request: Mapping[str, float | str]  # what was asked for: {"macs": 0.3}
    moments: Mapping[str, Moments] = field(default_factory=dict, compare=False, repr=False)
    """By layer the moments that the metric weighs errors with; no part of the JSON document."""

    @property
    def factorized(self) -> tuple[LayerPlan, ...]:
        """The entries of the layers that are replaced."""
        return tuple(layer for layer in self.layers if layer.method is not None)

    @property
    def loss(self) -> float:
        """The sum of the predicted losses, in the unit of the metric."""
        return sum(layer.loss for layer in self.layers)

    def __rich__(self) -> Table:
        request = ", ".join(f"{name} {value}" for name, value in self.request.items())
        table = Table(title=escape(f"plan: {request}"), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("layer", overflow="fold")
        for column in ("parameters", "MACs", "method", "rank", "loss", "kept"):
            table.add_column(column, justify="right", no_wrap=True)
        for layer in self.layers:
            table.add_row(
                escape(layer.name) or "(the model)",
                shortened(layer.before.parameters),
                shortened(layer.before.macs),
                layer.method or "-",
                "x".join(map(str, layer.rank or ())),
                f"{layer.loss:.3g}" if layer.method else "",
                _kept(layer.before, layer.after) if layer.method else "",
            )
        table.add_section()
        table.add_row(
            f"{len(self.factorized)} of {len(self.layers)} layers",
            shortened(self.before.parameters),
            shortened(self.before.macs),
            "",
            "",
            f"{self.loss:.3g}",
            _kept(self.before, self.after),
        )
        reasons: dict[str, list[str]] = {}
        for layer in self.layers:
            if layer.reason:
                reasons.setdefault(layer.reason, []).append(layer.name)
        lines = [f"dense: {', '.join(names)}: {reason}" for reason, names in reasons.items()]
        table.caption = Text("\n".join(["kept: parameters / MACs", *lines]), justify="left")
        return table

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON primitives."""
        return {
            "format_version": FORMAT_VERSION,
            **{key: value for key, value in asdict(self.bare()).items() if key != "moments"},
        }

    def with_layers(self, layers: tuple["LayerPlan", ...]) -> "Plan":
        """The same with other entries for its layers, in their order, and what the network costs.

        A latency that is not known of an entry counts as none.
        """
        after = self.after
        for old, new in zip(self.layers, layers, strict=True):
            latency = after.latency_ms
            if latency is not None and old.after.latency_ms is not None:
                latency += (new.after.latency_ms or 0.0) - old.after.latency_ms
            after = Cost(
                after.parameters + new.after.parameters - old.after.parameters,
                after.macs + new.after.macs - old.after.macs,
                latency,
            )
        return replace(self, layers=layers, after=after)

    def bare(self) -> "Plan":
        """The same without the moments, which can be large."""
        return replace(self, moments={})

    @staticmethod
    def from_json(document: Any) -> "Plan":
        """The plan of a JSON document; raises PlanError, saying where, for anything else."""
        check_tame(document)
        version = _take(document, "format_version", int, "plan")
        if version != FORMAT_VERSION:
            raise PlanError(f"plan: format version {version}, this rankfold reads {FORMAT_VERSION}")
        return Plan(
            layers=tuple(
                _layer_from_json(layer, f"plan: layer {index}")
                for index, layer in enumerate(_take(document, "layers", list, "plan"))
            ),
            before=_cost_from_json(_take(document, "before", dict, "plan"), "plan: before"),
            after=_cost_from_json(_take(document, "after", dict, "plan"), "plan: after"),
            metric=_take(document, "metric", str, "plan"),
            request=_request_from_json(_take(document, "request", dict, "plan")),
        )

    def save(self, path: str) -> None:
        """Write the plan to a JSON file."""
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.to_json(), file, indent=1)

    @staticmethod
    def load(path: str) -> "Plan":
        """Read a plan from a JSON file; raises PlanError for anything else."""
        try:
            return Plan.from_json(read_json(Path(path)))
        except (OSError, PlanError) as error:
            raise PlanError(f"{path}: {error}") from error


def _kept(before: Cost, after: Cost) -> str:
    """Parameters and MACs that are left, in percent."""
    pairs = ((before.parameters, after.parameters), (before.macs, after.macs))
    return " / ".join(f"{100 * b / a:.0f} %" if a else "-" for a, b in pairs)


def _take(document: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    if not isinstance(document, dict) or key not in document:
        raise PlanError(f"{where}: '{key}' is missing")
    value = document[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise PlanError(f"{where}: '{key}' is {value!r:.80}, of the wrong type")
    return value


def _request_from_json(document: dict[str, Any]) -> dict[str, float | str]:
    for name in document:
        _take(document, name, (int, float, str), "plan: request")
    return document


def _cost_from_json(document: Any, where: str) -> Cost:
    parameters, macs = (_take(document, name, int, where) for name in ("parameters", "macs"))
    latency = None
    if document.get("latency_ms") is not None:
        latency = float(_take(document, "latency_ms", (int, float), where))
    if min(parameters, macs) < 0 or not 0 <= (latency or 0.0) < math.inf:
        raise PlanError(f"{where}: costs are not negative: {document!r:.120}")
    return Cost(parameters, macs, latency)


def _layer_from_json(document: Any, where: str) -> LayerPlan:
    text = (str, type(None))
    method = _take(document, "method", text, where)
    if method is not None and method not in METHODS:
        raise PlanError(f"{where}: no method '{method:.40}'; there are {', '.join(METHODS)}")
    rank = _take(document, "rank", (list, type(None)), where)
    if (rank is None) != (method is None):
        raise PlanError(f"{where}: a method comes with a rank, and a rank with a method")
    if rank is not None and not all(type(entry) is int and entry > 0 for entry in rank):
        raise PlanError(f"{where}: rank {rank!r:.80} is not a list of positive integers")
    loss = _take(document, "loss", (int, float), where)
    if not math.isfinite(loss):
        raise PlanError(f"{where}: loss {loss} is not finite")
    layer = LayerPlan(
        name=_take(document, "name", str, where),
        layer=_take(document, "layer", str, where),
        before=_cost_from_json(_take(document, "before", dict, where), where),
        after=_cost_from_json(_take(document, "after", dict, where), where),
        method=method,
        settings=_take(document, "settings", (dict, type(None)), where),
        rank=None if rank is None else tuple(rank),
        loss=float(loss),
        reason=_take(document, "reason", text, where),
        reader=_take({"reader": None, **document}, "reader", text, where),
        tied=tuple(_take({"tied": [], **document}, "tied", (list, tuple), where)),
    )
    if not all(isinstance(name, str) for name in layer.tied):
        raise PlanError(f"{where}: 'tied' is {layer.tied!r:.80}, not names of layers")
    if method is not None:
        layer.make_method()
    return layer
