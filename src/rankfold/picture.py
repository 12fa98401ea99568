"""An analysis and a plan drawn as one figure, by matplotlib (extra `plot`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rankfold.analysis import AnalysedLayer, Analysis
from rankfold.errors import RankfoldError
from rankfold.knapsack import undominated
from rankfold.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_NAMED = 24  # layers that are told apart by name


def draw_analysis(analysis: Analysis, plan: Plan, path: Path) -> None:
    """Write a PNG, SVG or PDF: trade-off, layers, checks, spectra, and what each rank costs.

    Raises RankfoldError without matplotlib, or for a file that cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RankfoldError("a picture needs matplotlib: pip install 'rankfold[plot]'") from error
    figure = Figure(figsize=(16, 9), layout="constrained")
    axes = figure.subplots(2, 3)
    draw_curve(axes[0, 0], analysis, plan)
    draw_layers(axes[0, 1], analysis, plan)
    draw_checks(axes[0, 2], analysis)
    draw_spectra(axes[1, 0], analysis)
    draw_ranks(axes[1, 1], analysis)
    draw_trials(axes[1, 2], analysis)
    try:
        figure.savefig(path, dpi=100)
    except (OSError, ValueError) as error:
        raise RankfoldError(f"the picture {path} cannot be written: {error}") from error


def draw_curve(axes: "Axes", analysis: Analysis, plan: Plan) -> None:
    """The least predicted loss at every budget of MACs, and where the plan is."""
    points = [point for point in analysis.curve("macs") if point.loss > 0]
    dense = plan.before.macs
    axes.semilogy([p.cost.macs / dense for p in points], [p.loss for p in points], marker=".")
    if plan.loss > 0:
        axes.plot(plan.after.macs / dense, plan.loss, "o", color="C3", label="the plan")
        axes.legend()
    _label(axes, "Trade-off", "MACs kept", "predicted loss")


def draw_layers(axes: "Axes", analysis: Analysis, plan: Plan) -> None:
    """The share of each layer in MACs, or in time where it is known, before and after."""
    timed = analysis.timing is not None
    entries = [e for e in plan.layers if (e.before.latency_ms if timed else e.before.macs)]
    total = plan.before.latency_ms if timed else plan.before.macs
    for offset, kind, color in ((-0.2, "before", "0.7"), (0.2, "after", "C0")):
        costs = [getattr(entry, kind) for entry in entries]
        shares = [(cost.latency_ms if timed else cost.macs) / (total or 1) for cost in costs]
        axes.barh(np.arange(len(entries)) + offset, shares, 0.4, color=color, label=kind)
    axes.set_yticks(range(len(entries)), [entry.name for entry in entries], fontsize=7)
    axes.invert_yaxis()
    axes.legend()
    _label(axes, "Layers", "share of time" if timed else "share of MACs", "")


def draw_checks(axes: "Axes", analysis: Analysis) -> None:
    """Single layers replaced: predicted and measured loss."""
    found = [c for c in analysis.checks if c.predicted > 0 and c.measured > 0]
    axes.loglog([c.predicted for c in found], [c.measured for c in found], "o", markersize=4)
    _diagonal(axes)
    title = "Single layers"
    if found:
        title += f": rank correlation {analysis.agreement:.2f}"
    _label(axes, title, "predicted loss", "measured divergence")


def draw_spectra(axes: "Axes", analysis: Analysis) -> None:
    """Singular values of each weight's first unfolding, relative to the greatest."""
    for layer in _able(analysis):
        values = next(iter(layer.spectra.values()))[0].singular_values.cpu()
        if values.numel() > 1 and values[0] > 0:
            places = np.linspace(0, 1, values.numel())
            axes.semilogy(places, (values / values[0]).clamp_min(1e-6), label=layer.name)
    _label(axes, "Spectra of the weights", "rank, of full", "singular value, relative")
    _legend(axes, analysis)


def draw_ranks(axes: "Axes", analysis: Analysis) -> None:
    """What each layer loses at each share of its MACs, by its best method and rank."""
    for layer in _able(analysis):
        options = [candidate for candidate in layer.candidates if candidate.loss > 0]
        if not options:
            continue
        losses = np.array([candidate.loss for candidate in options])
        shares = np.array([[candidate.macs / layer.macs] for candidate in options])
        best = undominated(losses, shares)
        axes.semilogy(shares[best, 0], losses[best], label=layer.name)
    _label(axes, "What each rank costs", "MACs kept of the layer", "loss")
    _legend(axes, analysis)


def draw_trials(axes: "Axes", analysis: Analysis) -> None:
    """Whole plans: predicted and measured loss, in the metrics that competed."""
    names = list(dict.fromkeys(trial.metric for trial in analysis.trials))
    for name in names:
        trials = [trial for trial in analysis.trials if trial.metric == name]
        measured = [max(trial.measured, 1e-12) for trial in trials]
        axes.loglog([t.predicted for t in trials], measured, "o", label=name)
    _diagonal(axes)
    if names:
        axes.legend(fontsize=7)
    _label(axes, "Whole plans", "predicted loss", "measured divergence")


def _able(analysis: Analysis) -> Sequence[AnalysedLayer]:
    return [layer for layer in analysis.layers if layer.spectra]


def _legend(axes: "Axes", analysis: Analysis) -> None:
    if 0 < len(_able(analysis)) <= _MOST_NAMED:
        axes.legend(fontsize=6, ncols=2)


def _diagonal(axes: "Axes") -> None:
    limits = [*axes.get_xlim(), *axes.get_ylim()]
    low, high = min(limits), max(limits)
    axes.plot([low, high], [low, high], color="0.6", linestyle="--", zorder=0)


def _label(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
