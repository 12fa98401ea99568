"""Input matrices of a recurrent layer of low rank, the product of all steps at once in front of it.

The inputs x of a recurrent layer are approximated, x ≈ R P x, for all gates and both directions
alike: P x is a linear layer in front of one of fewer inputs, whose input matrices are W_ih R. To
second order this costs ½ T tr(G E), E = (1 - R P) A (1 - R P)ᵀ, for A = E[x xᵀ] and G the moment of
the gradients at the inputs, which come through all gates and steps; the best R P of each rank is a
truncated SVD of the identity in the metric of A and G. This is W_ih of low rank in the metric of
the gates (compare the low rank of both matrices in Prabhavalkar et al. 2016, arXiv:1603.08042),
without the moments of these, which are many.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import nn

from rankfold.decompose.decomposition import working_precision
from rankfold.layers import (
    RECURRENT,
    ProjectedInputs,
    Recurrent,
    block_names,
    check_ranks,
    directions_of,
    input_limit,
    parameter_like,
)
from rankfold.methods.method import Rank, Spectrum, aligned_ranks, check_alignment, other_kind
from rankfold.methods.moments import WEIGHT_METRIC, Moments, losses_by_rank
from rankfold.methods.svd import low_rank_factors


@dataclass(frozen=True)
class LowRankInputs:
    """W_ih ≈ (W_ih R) P: a linear layer, and a recurrent layer of r inputs.

    Takes `nn.LSTM`, `nn.GRU` and `nn.RNN` with any number of directions; of several layers the
    first alone changes. Ranks are (r,). The moments are those of the layer's inputs (`given` of
    `Moments`); where no gradients are known all gates count alike. It saves what wide inputs cost,
    and no time in the steps: that is what fewer units do.
    """

    name: ClassVar[str] = "low-rank-inputs"
    alignment: int = 8

    def __post_init__(self) -> None:
        check_alignment(self.alignment)

    def why_not(self, layer: nn.Module) -> str | None:
        if type(layer) not in RECURRENT or not isinstance(layer, Recurrent):
            return other_kind(layer)
        if layer.proj_size > 0:
            return f"its {layer.hidden_size} units are projected to {layer.proj_size} already"
        if input_limit(layer) <= self.alignment:
            return f"only {layer.input_size} inputs to project"
        return None

    def fit(self, layer: Recurrent, moments: Moments) -> "ProjectedInputsFamily":
        for parameter in layer.parameters():
            working_precision(parameter)  # refuses NaN
        weight = torch.cat(_input_weights(layer)).double()
        given = moments.given or replace(WEIGHT_METRIC, scale=moments.scale)
        factors = _by_gates(weight, given) if given.gradients is None else _by_data(weight, given)
        return ProjectedInputsFamily(layer, *factors, given.scale, self.alignment)

    def skeleton(self, layer: Recurrent, rank: Rank) -> ProjectedInputs:
        check_ranks(rank, (input_limit(layer),), layer)
        return ProjectedInputs(layer, rank[0], device="meta")


@dataclass(frozen=True)
class ProjectedInputsFamily:
    """A layer with its inputs projected: every rank keeps the first rows of one projection."""

    layer: Recurrent
    weights: torch.Tensor  # W_ih R: (directions * gates * hidden, full rank), float64
    projection: torch.Tensor  # P: (full rank, inputs), likewise
    singular_values: torch.Tensor  # (full rank,), in the metric
    scale: float | None  # loss per unit of tr(G E); None: relative to tr(G A)
    alignment: int

    @property
    def spectra(self) -> Sequence[Spectrum]:
        return (Spectrum(self.singular_values, (len(self.weights), self.layer.input_size)),)

    def ranks(self) -> Sequence[Rank]:
        return [(rank,) for rank in aligned_ranks(input_limit(self.layer), self.alignment)]

    @cached_property
    def _losses(self) -> torch.Tensor:
        """Of each rank from 0 on: (full rank + 1,)."""
        return losses_by_rank(self.singular_values.square(), self.scale)

    def loss(self, rank: Rank) -> float:
        check_ranks(rank, (input_limit(self.layer),), self.layer)
        return self._losses[rank[0]].item()

    def build(self, rank: Rank) -> ProjectedInputs:
        check_ranks(rank, (input_limit(self.layer),), self.layer)
        form = ProjectedInputs(self.layer, rank[0], device="meta")
        dense = dict(self.layer.named_parameters())
        first = [f"weight_ih{end}" for end in block_names(self.layer)[: directions_of(self.layer)]]
        parts = self.weights[:, : rank[0]].chunk(len(first))
        recurrent: Any = form.recurrent
        for name, value in (dense | dict(zip(first, parts, strict=True))).items():
            setattr(recurrent, name, parameter_like(value, dense[name]))
        form.projection.weight = parameter_like(self.projection[: rank[0]], dense[first[0]])
        recurrent.flatten_parameters()
        return form.train(self.layer.training)


Factors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _by_gates(weight: torch.Tensor, given: Moments) -> Factors:
    """W_ih R, P and singular values where all gates count alike, as much as inputs on average."""
    left, right, values = low_rank_factors(weight, Moments(given.inputs))
    mean = weight.square().sum().item() / weight.shape[1]
    return left, right, values / mean**0.5 if mean > 0 else values


def _by_data(weight: torch.Tensor, given: Moments) -> Factors:
    """W_ih R, P and singular values with the gradients at the inputs known."""
    rows, columns = weight.shape
    basis = torch.eye(columns).to(weight)
    if rows < columns:  # the gates see no more of the inputs than this
        basis = torch.linalg.svd(weight, full_matrices=False).Vh
    inputs, gradients = (
        None if moment is None else basis @ _matrix(moment) @ basis.mT
        for moment in (given.inputs, given.gradients)
    )
    identity = torch.eye(len(basis)).to(weight)
    readout, projection, values = low_rank_factors(identity, Moments(inputs, gradients))
    return weight @ basis.mT @ readout, projection @ basis, values


def _matrix(moment: torch.Tensor) -> torch.Tensor:
    return moment.diag() if moment.dim() == 1 else moment


def _input_weights(layer: Recurrent) -> list[torch.Tensor]:
    names = block_names(layer)[: directions_of(layer)]
    return [layer.get_parameter(f"weight_ih{end}").detach() for end in names]
