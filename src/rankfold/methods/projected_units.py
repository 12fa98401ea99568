"""An LSTM whose states are projected: all cells are kept, and fewer numbers pass on what they say.

Prabhavalkar et al. (ICASSP 2016, arXiv:1603.08042): the recurrent matrix and all that reads the
states are of low rank with one right factor in common, P, which projects the states: `proj_size` of
`nn.LSTM` (Sak et al. 2014). There P comes from an SVD of the recurrent matrix; here the states
themselves are approximated, h ≈ R P h, which to second order costs ½ T tr(G E), E = (1 - R P) A
(1 - R P)ᵀ, for A = E[h hᵀ] and G the moment of the gradients at the states through all that reads
them. The best R P of each rank is a truncated SVD of the identity in the metric of A and G.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import nn

from rankfold.layers import (
    ProjectedUnits,
    block_names,
    check_ranks,
    directions_of,
    parameter_like,
    recurrent_weight,
)
from rankfold.methods.fewer_units import state_moments
from rankfold.methods.method import Rank, Spectrum, aligned_ranks, check_alignment, other_kind
from rankfold.methods.moments import Moments, losses_by_rank
from rankfold.methods.svd import low_rank_factors


@dataclass(frozen=True)
class ProjectUnits:
    """h ≈ R P h: an LSTM with `proj_size`, in each direction of each of its layers, and a readout.

    Takes `nn.LSTM` with any number of layers and directions. Ranks are (r,), below the number of
    units. Fewer parameters and MACs than the dense layer, and faster on CUDA; on CPUs torch's
    projected LSTM is slower than a dense one, as a measured latency will say. The moments are those
    of the states, as for `fewer-units`.
    """

    name: ClassVar[str] = "projected-units"
    alignment: int = 8

    def __post_init__(self) -> None:
        check_alignment(self.alignment)

    def why_not(self, layer: nn.Module) -> str | None:
        if type(layer) is not nn.LSTM:
            return other_kind(layer)
        if layer.proj_size > 0:
            return f"its {layer.hidden_size} units are projected to {layer.proj_size} already"
        if layer.hidden_size <= self.alignment:
            return f"only {layer.hidden_size} hidden units to project"
        return None

    def fit(self, layer: nn.LSTM, moments: Moments) -> "ProjectedStates":
        blocks = [
            low_rank_factors(torch.eye(len(states)).to(states), Moments(states, gradients))
            for states, gradients in zip(*state_moments(layer, moments), strict=True)
        ]
        readouts, projections, values = (torch.stack(same) for same in zip(*blocks, strict=True))
        return ProjectedStates(layer, readouts, projections, values, moments.scale, self.alignment)

    def skeleton(self, layer: nn.LSTM, rank: Rank) -> ProjectedUnits:
        check_ranks(rank, (layer.hidden_size - 1,), layer)
        return ProjectedUnits(layer, rank[0], device="meta")


@dataclass(frozen=True)
class ProjectedStates:
    """A layer with the projections of its states: every rank keeps the first rows of them."""

    layer: nn.LSTM
    readouts: torch.Tensor  # R: (layers * directions, hidden, hidden), float64
    projections: torch.Tensor  # P, likewise
    singular_values: torch.Tensor  # (layers * directions, hidden), of the identity in the metric
    scale: float | None  # loss per unit of tr(G E); None: relative to tr(G A)
    alignment: int

    @property
    def spectra(self) -> Sequence[Spectrum]:
        return ()

    def ranks(self) -> Sequence[Rank]:
        return [(rank,) for rank in aligned_ranks(self.layer.hidden_size - 1, self.alignment)]

    @cached_property
    def _losses(self) -> torch.Tensor:
        """Of each rank from 0 on: (hidden + 1,)."""
        return losses_by_rank(self.singular_values.square().sum(0), self.scale)

    def loss(self, rank: Rank) -> float:
        check_ranks(rank, (self.layer.hidden_size - 1,), self.layer)
        return self._losses[rank[0]].item()

    def build(self, rank: Rank) -> ProjectedUnits:
        check_ranks(rank, (self.layer.hidden_size - 1,), self.layer)
        form = ProjectedUnits(self.layer, rank[0], device="meta")
        _assign(form, self.layer, self.readouts[:, :, : rank[0]], self.projections[:, : rank[0]])
        return form


def _assign(
    form: ProjectedUnits, layer: nn.LSTM, readouts: torch.Tensor, projections: torch.Tensor
) -> None:
    """The weights of the layer, reading R P h wherever they read h; copies."""
    directions = directions_of(layer)

    projected: Any = form.recurrent
    like = recurrent_weight(layer)
    for block, name in enumerate(block_names(layer)):
        below = block // directions * directions
        reads = {"weight_hh": readouts[block]}
        if below > 0:
            reads["weight_ih"] = torch.block_diag(*readouts[below - directions : below])
        for kind in ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if layer.bias else ())):
            dense = getattr(layer, f"{kind}{name}")
            value = dense.detach()
            if kind in reads:
                value = value.double() @ reads[kind].to(value.device)
            setattr(projected, f"{kind}{name}", parameter_like(value, dense))
        setattr(projected, f"weight_hr{name}", parameter_like(projections[block], like))
    form.readout.weight = parameter_like(torch.block_diag(*readouts[-directions:]), like)
    form.states = parameter_like(readouts.mT, like)
    projected.flatten_parameters()
    form.train(layer.training)
