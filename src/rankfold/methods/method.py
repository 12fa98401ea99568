"""What a method is: a recipe that fits a factorized form to one dense layer.

A `Method` is a frozen dataclass whose fields are its settings (JSON primitives). Fitting it to a
layer gives a `Family`: every approximation of that layer, fitted once, read off at any rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from rankfold.layers import CONVOLUTIONS
from rankfold.methods.moments import Moments

Rank = tuple[int, ...]


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one unfolding: what one entry of a rank truncates."""

    singular_values: torch.Tensor  # (min(shape),), descending, float64
    shape: tuple[int, int]


class Family(Protocol):
    """Every approximation of one layer that one method offers."""

    @property
    def spectra(self) -> Sequence[Spectrum]:
        """One per entry of the rank; empty where the form has no such spectra."""

    def ranks(self) -> Sequence[Rank]:
        """The candidates, aligned to what the hardware likes, up to full rank."""

    def loss(self, rank: Rank) -> float:
        """What the truncation to this rank costs, in the unit of the metric (see `Moments`)."""

    def build(self, rank: Rank) -> nn.Module:
        """The factorized layer of any rank within bounds, fitted; raises RankError outside."""


class Method(Protocol):
    """A published method for one layer."""

    name: ClassVar[str]
    # A dataclass; said here so that the settings can be read from and written to a plan.
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __init__(self, *, alignment: int = 8) -> None: ...

    def why_not(self, layer: nn.Module) -> str | None:
        """Why the method cannot take this layer ("grouped convolution, groups=4"), or None."""

    def fit(self, layer: Any, moments: Moments) -> Family:
        """Fit the method, in a metric, to a layer for which `why_not` is None."""

    def skeleton(self, layer: Any, rank: Rank) -> nn.Module:
        """The form at this rank on the meta device: shapes only; raises RankError."""


def other_kind(layer: nn.Module) -> str:
    """Why a method for layers of another kind cannot take this one."""
    return f"no factorization for {type(layer).__name__} layers"


def why_not_dense(
    layer: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS)
) -> str | None:
    """Why the layer is none of these kinds with a weight and without groups, or None.

    Grouped convolutions come to a method as plain ones (see `rankfold.methods.reduction`).
    """
    if type(layer) not in kinds:
        return other_kind(layer)
    if not isinstance(weight := layer.weight, nn.Parameter):
        return "its weight is no parameter: something makes it at every call"
    if weight.numel() == 0:
        return "its weight is empty"
    groups = getattr(layer, "groups", 1)
    return None if groups == 1 else f"grouped convolution, groups={groups}"


def why_not_spatial(layer: nn.Module, axes: int = 1, channels: int = 1) -> str | None:
    """Why the layer is no convolution for a method that takes the kernel's axes for modes, or None.

    The kernel must be longer than 1 along so many `axes`, with so many `channels` on both sides.
    """
    if (reason := why_not_dense(layer, CONVOLUTIONS)) is not None:
        return reason
    outputs, inputs, *lengths = layer.get_parameter("weight").shape
    longer = sum(length > 1 for length in lengths)
    size = "x".join(map(str, lengths))
    if longer == 0:
        return f"a kernel of {size} has no spatial modes: svd serves it"
    if longer < axes:
        return f"a kernel of {size} is longer than 1 along one axis alone: tucker2 serves it"
    fewest = min(outputs, inputs)
    if fewest < channels:
        return f"only {fewest} channel{'s' * (fewest > 1)} on a side: svd serves it"
    return None


def aligned_ranks(limit: int, alignment: int) -> range | list[int]:
    """The multiples of `alignment` below `limit`, and `limit` itself."""
    return [*range(alignment, limit, alignment), limit]


def check_alignment(alignment: int) -> None:
    """Raise ValueError unless the alignment is an integer of at least 1."""
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"alignment is an integer of at least 1, not {alignment!r:.40}")
