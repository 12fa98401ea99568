"""The metrics that layers can be approximated in, by name.

    weight                plain SVD, HOSVD
    response              the second moment of the inputs (Zhang et al. 2016); under the name
                          svd-llm (Wang et al. 2025), the same, each layer relative to its own
    fisher:<curvature>    inputs and gradients; "fisher" alone takes the first curvature there is
    asvd                  inputs scaled by their mean magnitude to the power ½ (Yuan et al. 2023)
    fwsvd                 rows weighted by their Fisher information (Hsu et al. 2022)

Where gradients are known, weight and response are put in the unit of the Fisher metric by the mean
of what they leave out, so that their losses can be compared between layers.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from rankfold.analysis.statistics import Statistics
from rankfold.errors import CalibrationError, RankfoldError
from rankfold.methods import WEIGHT_METRIC, Moments

METRICS = ("weight", "response", "fisher", "svd-llm", "asvd", "fwsvd")
# Of the mean eigenvalue, added to all: what few samples did not show is not nothing.
DAMPING = 0.05
_INPUT_DAMPING = 1e-6


def check_metric(metric: str) -> None:
    """Raise RankfoldError unless there is such a metric."""
    if metric != "auto" and metric.partition(":")[0] not in METRICS:
        raise RankfoldError(f"no metric '{metric}'; there are auto, {', '.join(METRICS)}")


def typical_scale(metric: str, layers: Iterable[Statistics]) -> float | None:
    """The mean over layers of the loss per squared error of a response; None without gradients."""
    curvature = metric.partition(":")[2]
    found = [
        one.positions / 2 * _mean_square(_gradients(one, curvature))
        for one in layers
        if one.gradients
    ]
    return sum(found) / len(found) if found else None


def moments_of(
    metric: str,
    statistics: Statistics | None,
    damping: float = DAMPING,
    typical: float | None = None,
) -> Moments:
    """The moments of a layer in a metric; those of the weight metric where nothing is known of it.

    `typical` is the unit of a layer that the gradients do not reach (see `typical_scale`).
    Raises CalibrationError for a curvature that was not gathered.
    """
    if statistics is None:
        return WEIGHT_METRIC
    if statistics.given is None:
        return _moments_of(metric, statistics, damping, typical)
    states, given = (
        _moments_of(metric, one, damping, typical) for one in (statistics, statistics.given)
    )
    return replace(states, given=given)


def _moments_of(
    metric: str, statistics: Statistics, damping: float, typical: float | None
) -> Moments:
    name, _, curvature = metric.partition(":")
    if name == "svd-llm":
        return Moments(inputs=_damped(statistics.inputs, _INPUT_DAMPING))
    if name == "asvd":
        by_input = statistics.magnitudes
        return Moments(by_input if statistics.inputs.dim() == 1 else torch.diag_embed(by_input))
    if not statistics.gradients:
        inputs = None if name in ("weight", "fwsvd") else statistics.inputs
        if inputs is None:
            return WEIGHT_METRIC
        return Moments(_damped(inputs, _INPUT_DAMPING), None, typical)
    gradients = _gradients(statistics, curvature)
    if name == "fwsvd":
        squares = _damped(gradients, 1e-6)
        if squares.dim() > 1:
            squares = torch.diag_embed(squares.diagonal(dim1=-2, dim2=-1))
        return Moments(gradients=squares)
    inputs = _damped(statistics.inputs, _INPUT_DAMPING)
    half = statistics.positions / 2
    mean_gradient = _mean_square(gradients)
    if name == "fisher" and mean_gradient > 0:
        return Moments(inputs, _damped(gradients, damping), half)
    if name in ("response", "fisher"):  # without any gradient no error costs anything
        return Moments(inputs, None, half * mean_gradient)
    return Moments(None, None, half * mean_gradient * _mean_square(inputs))


def competing(curvatures: Sequence[str]) -> list[str]:
    """The metrics that "auto" chooses from."""
    if not curvatures:
        return ["response"]
    return [*(f"fisher:{name}" for name in curvatures), f"response:{curvatures[0]}"]


def _gradients(statistics: Statistics, curvature: str) -> torch.Tensor:
    name = curvature or next(iter(statistics.gradients))
    if name not in statistics.gradients:
        raise CalibrationError(
            f"no curvature '{name}' was gathered; there are {', '.join(statistics.gradients)}"
        )
    return statistics.gradients[name]


def _mean_square(moment: torch.Tensor) -> float:
    """The mean eigenvalue, over all blocks of a moment that has some."""
    if moment.dim() == 1:  # the diagonal itself
        return moment.mean().item()
    return moment.diagonal(dim1=-2, dim2=-1).mean().item()


def _damped(moment: torch.Tensor, damping: float) -> torch.Tensor:
    """The moment plus a share of its mean eigenvalue; the identity for a moment of nothing.

    A block of nothing beside others gets its share of their mean.
    """
    mean = _mean_square(moment)
    if moment.dim() == 1:
        return moment + damping * mean if mean > 0 else torch.ones_like(moment)
    identity = torch.eye(moment.shape[-1], dtype=moment.dtype).expand_as(moment)
    return identity if mean == 0 else moment + damping * mean * identity
