"""A network to compress: its data, how it is judged, and how it is recovered."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from rankfold.distances import Distance
from rankfold.measure import Metric


@dataclass(frozen=True)
class Case:
    """One network. Contenders see `data` and `training`; `score` is for the result alone."""

    name: str
    unit: str  # of the score, higher is better
    make_model: Callable[[], nn.Module]
    data: list[Any]  # to calibrate on, without labels; the first batch is timed
    training: list[Any]  # to recover on, without labels
    score: Callable[[nn.Module], float]
    distance: Distance
    epochs: int  # of recovery, the same for every contender
    learning_rate: float
    point: float = 0.01  # of the score: what may be lost where times are compared
    validation: list[Any] | None = None  # of recovery, beside `training`; no labels either
    agreement: Metric | None = None  # on it: which epoch is kept, where the distance says little
    fixed: tuple[str, ...] = ()  # layers whose outputs the network's own code counts
    heads: Mapping[str, int] = field(default_factory=dict)  # of attention, by its linear layers
