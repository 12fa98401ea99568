"""Fewer hidden units of a recurrent layer or cell: LSTM, GRU or plain.

A unit is removed from all gates at once (intrinsic sparse structures: Wen et al. 2018), which
leaves a smaller layer of the same kind, on torch's fused kernels. Here the units are neither
learned nor dropped: with the states h of which S are kept, those removed are replaced by their best
linear prediction, ĥ = R h_S, R = A_·S A_SS⁻¹ (A = E[h hᵀ]), and everything that reads the states
reads R h_S instead: the recurrent matrix becomes W_hh R, the next layer's W_ih R, and a linear
readout gives the outputs. To second order this costs ½ T tr(G (A - R A_S·)), G the moment of the
gradients at the states through all that reads them. Choosing S is a column subset selection of A in
the metric of G; units are taken away one by one, each time the one that is missed least.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import nn

from rankfold.decompose.decomposition import working_precision
from rankfold.errors import TensorError
from rankfold.layers import (
    CELLS,
    RECURRENT,
    Cell,
    FewerUnits,
    FewerUnitsCell,
    Recurrent,
    block_names,
    check_ranks,
    directions_of,
    parameter_like,
    recurrent_weight,
)
from rankfold.methods.method import Rank, Spectrum, aligned_ranks, check_alignment, other_kind
from rankfold.methods.moments import Moments
from rankfold.methods.refit import best_last_factor

# Variances below this share of a block's greatest are rounding: of units that others determine.
_LEAST = 1e-10


@dataclass(frozen=True)
class RemoveUnits:
    """h ≈ R h_S: a layer of r units in each direction of each of its layers, and a readout.

    Takes `nn.LSTM`, `nn.GRU` and `nn.RNN` with any number of layers and directions, and the cells
    of these. Ranks are (r,).

    The moments are those of the states, one block for each layer and direction in the order of h_n:
    A and G (layers * directions, hidden, hidden); of a cell there is one. Without A the units count
    as uncorrelated, each as much as its weights; without A and G the next step's gates read them,
    and the outputs.
    """

    name: ClassVar[str] = "fewer-units"
    alignment: int = 8

    def __post_init__(self) -> None:
        check_alignment(self.alignment)

    def why_not(self, layer: nn.Module) -> str | None:
        if type(layer) not in (*RECURRENT, *CELLS) or not isinstance(layer, Recurrent | Cell):
            return other_kind(layer)
        if isinstance(layer, Recurrent) and layer.proj_size > 0:
            return f"its {layer.hidden_size} units are projected to {layer.proj_size} already"
        if layer.hidden_size <= self.alignment:
            return f"only {layer.hidden_size} hidden units to reduce"
        return None

    def fit(self, layer: Recurrent | Cell, moments: Moments) -> "RemovedUnits":
        states, gradients = state_moments(layer, moments)
        order = _most_needed_first(states, gradients)
        return RemovedUnits(layer, states, gradients, order, moments.scale, self.alignment)

    def skeleton(self, layer: Recurrent | Cell, rank: Rank) -> FewerUnits | FewerUnitsCell:
        check_ranks(rank, (layer.hidden_size,), layer)
        return _skeleton(layer, rank[0])


@dataclass(frozen=True)
class RemovedUnits:
    """A layer with its most needed units: every rank keeps the first ones of one order."""

    layer: Recurrent | Cell
    states: torch.Tensor  # A: (layers * directions, hidden, hidden), float64
    gradients: torch.Tensor  # G, likewise
    order: torch.Tensor  # (layers * directions, hidden), the most needed unit first
    scale: float | None  # loss per unit of tr(G E); None: relative to tr(G A)
    alignment: int

    @property
    def spectra(self) -> Sequence[Spectrum]:
        return ()

    def ranks(self) -> Sequence[Rank]:
        return [(rank,) for rank in aligned_ranks(self.layer.hidden_size, self.alignment)]

    @cached_property
    def _losses(self) -> torch.Tensor:
        """Of each number of units from 0 on: (hidden + 1,)."""
        errors = sum(map(_errors, self.states, self.gradients, self.order), torch.zeros(()))
        whole = errors[0].item()
        scale = self.scale
        if scale is None:
            scale = 1 / whole if whole > 0 else 0.0
        return (scale * errors).clamp_min(0).cpu()

    def loss(self, rank: Rank) -> float:
        check_ranks(rank, (self.layer.hidden_size,), self.layer)
        return self._losses[rank[0]].item()

    def build(self, rank: Rank) -> FewerUnits | FewerUnitsCell:
        check_ranks(rank, (self.layer.hidden_size,), self.layer)
        form = _skeleton(self.layer, rank[0])
        kept = self.order[:, : rank[0]].clone(memory_format=torch.contiguous_format).sort().values
        readouts = [_readout(*block) for block in zip(self.states, kept, strict=True)]
        _assign(form, self.layer, kept, readouts)
        return form


def _skeleton(layer: Recurrent | Cell, units: int) -> FewerUnits | FewerUnitsCell:
    if isinstance(layer, CELLS):
        return FewerUnitsCell(layer, units, device="meta")
    return FewerUnits(layer, units, device="meta")


def state_moments(layer: Recurrent | Cell, moments: Moments) -> tuple[torch.Tensor, torch.Tensor]:
    """A and G of the states, (layers * directions, hidden, hidden), float64; of what is known.

    Without A the units count as uncorrelated, each as much as its weights; without A and G the next
    step's gates read them, and the outputs. Raises TensorError for weights that hold NaN or
    whose fourth powers overflow.
    """
    for parameter in layer.parameters():
        working_precision(parameter)  # refuses NaN
    states = _states_by_weights(layer) if moments.inputs is None else moments.inputs.double()
    gradients = moments.gradients
    if gradients is None and moments.inputs is None:
        gradients = _reads_by_weights(layer)
    elif gradients is None:
        gradients = torch.eye(layer.hidden_size).to(states).expand_as(states)
    gradients = gradients.double()
    if not torch.isfinite(states.abs().max() * gradients.abs().max() * layer.hidden_size**3):
        raise TensorError(f"the weights of {layer} are too large for float64: scale them down")
    return states, gradients


def _states_by_weights(layer: Recurrent | Cell) -> torch.Tensor:
    """The squared norms of the weights that a unit's candidate value is made with, as A.

    A unit without such weights and bias is 0 at all times.
    """
    moments = []
    for name in block_names(layer):
        kinds = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if layer.bias else [])]
        blocks = (_gates(getattr(layer, f"{kind}{name}"), layer) for kind in kinds)
        # Of the gates of an LSTM and a GRU the third is the candidate.
        rows = torch.cat([block[min(2, len(block) - 1)].flatten(1) for block in blocks], 1)
        moments.append(rows.square().sum(1).diag())
    return torch.stack(moments)


def _reads_by_weights(layer: Recurrent | Cell) -> torch.Tensor:
    """As G: all that reads the states, the outputs and the gates of the next step, counts alike."""
    reads = []
    for name in block_names(layer):
        weight = getattr(layer, f"weight_hh{name}").detach().double()
        reads.append(weight.mT @ weight + torch.eye(layer.hidden_size).to(weight))
    return torch.stack(reads)


def _gates(parameter: torch.Tensor, layer: Recurrent | Cell) -> torch.Tensor:
    """(gates * hidden, ...) as (gates, hidden, entries), float64."""
    return parameter.detach().double().reshape(-1, layer.hidden_size, parameter[0].numel())


def _most_needed_first(states: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """An order of the units of each block of A and G, (blocks, units, units): (blocks, units).

    From all units on, the one whose removal raises tr(G E) least goes. With K = A_SS⁻¹ unit j is
    predicted by the others but for a variance 1 / K_jj, which reaches all units along R's column j.
    """
    blocks, units, _ = states.shape
    identity = torch.eye(units).to(states)
    # Sums of float32 products are not quite positive: no Cholesky factorization.
    values, vectors = torch.linalg.eigh(states)
    greatest = values[:, -1:]
    values = values.maximum(torch.where(greatest > 0, _LEAST * greatest, 1))
    precision = vectors / values[:, None] @ vectors.mT
    readout = identity.repeat(blocks, 1, 1)
    read = gradients.clone()  # G R
    removed = torch.zeros(blocks, units, dtype=torch.bool, device=states.device)
    order = []
    every = torch.arange(blocks, device=states.device)
    for _ in range(units):
        variances = 1 / precision.diagonal(dim1=1, dim2=2).clamp_min(1e-300)
        rises = variances * (readout * read).sum(1)
        least = rises.masked_fill(removed, torch.inf).argmin(1)
        order.append(least)
        removed[every, least] = True
        row = precision[every, least]
        share = row / row[every, least][:, None]
        readout -= readout[every, :, least][:, :, None] * share[:, None, :]
        read -= read[every, :, least][:, :, None] * share[:, None, :]
        precision -= row[:, :, None] * share[:, None, :]
    return torch.stack(order[::-1], 1)


def _errors(states: torch.Tensor, gradients: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """tr(G E) of one block with the first units of an order kept, of each number: (units + 1,)."""
    error = states[order][:, order].clone()
    metric = gradients[order][:, order]
    found = [(metric * error).sum()]
    least = _LEAST * error.diagonal().max()
    for unit in range(len(order)):
        if error[unit, unit] > least:
            error -= error[:, unit, None] * (error[unit] / error[unit, unit])
        error[unit] = error[:, unit] = 0
        found.append((metric * error).sum())
    # Rounding apart, no unit more makes it worse.
    return torch.stack(found).clamp_min(0).cummin(0).values


def _readout(states: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """R of one block: all units of the kept ones, (hidden, kept)."""
    identity = torch.eye(len(states)).to(states)
    readout = best_last_factor(identity, identity[kept], Moments(states))
    readout[kept] = identity[: len(kept), : len(kept)]
    return readout


def _assign(
    form: FewerUnits | FewerUnitsCell,
    layer: Recurrent | Cell,
    kept: torch.Tensor,
    readouts: Sequence[torch.Tensor],
) -> None:
    """The weights of the kept units, reading R h_S wherever they read h; copies."""
    directions = directions_of(layer)

    small: Any = form.recurrent
    for block, name in enumerate(block_names(layer)):
        below = block // directions * directions
        reads = {"weight_hh": readouts[block]}
        if below > 0:
            reads["weight_ih"] = torch.block_diag(*readouts[below - directions : below])
        for kind in ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if layer.bias else ())):
            dense = getattr(layer, f"{kind}{name}")
            rows = _gates(dense, layer)[:, kept[block]].flatten(0, 1)
            if kind in reads:
                rows = rows @ reads[kind]
            rows = rows if dense.dim() == 2 else rows[:, 0]
            setattr(small, f"{kind}{name}", parameter_like(rows, dense))
    like = recurrent_weight(layer)
    form.readout.weight = parameter_like(torch.block_diag(*readouts[-directions:]), like)
    form.kept = (kept if isinstance(form, FewerUnits) else kept[0]).to(like.device)
    if isinstance(form, FewerUnits):
        form.states = parameter_like(torch.stack([readout.mT for readout in readouts]), like)
        small.flatten_parameters()
    form.train(layer.training)
