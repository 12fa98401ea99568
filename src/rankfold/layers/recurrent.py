"""Recurrent layers and cells of fewer states, which give those of all the units there were."""

from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from rankfold.layers.form import check_ranks

Recurrent = nn.LSTM | nn.GRU | nn.RNN
Cell = nn.LSTMCell | nn.GRUCell | nn.RNNCell
RECURRENT = (nn.LSTM, nn.GRU, nn.RNN)
CELLS = (nn.LSTMCell, nn.GRUCell, nn.RNNCell)


class ReducedStates(nn.Module):
    """A recurrent layer of torch's own with fewer states, and a linear readout of all units.

    Called as the dense layer is, with the same shapes: a sequence, batched or not, or a
    `PackedSequence`, and initial states of all units: a sequence can be run in parts. The
    recurrence is torch's fused one. No layer of the dense one's size does exactly the same: there
    is no `to_dense`.
    """

    def __init__(self, layer: Recurrent, recurrent: Recurrent, states: int) -> None:
        """Of the shape and dtype of `layer`; `recurrent` gives so many states in each direction."""
        super().__init__()
        weight = recurrent_weight(recurrent)
        self.input_size, self.hidden_size = layer.input_size, layer.hidden_size
        self.num_layers, self.batch_first = layer.num_layers, layer.batch_first
        self.bidirectional = layer.bidirectional
        directions = directions_of(layer)
        self.recurrent = recurrent
        self.readout = nn.Linear(
            directions * states,
            directions * layer.hidden_size,
            False,
            weight.device,
            weight.dtype,
        )
        # Made on the CPU: on the meta device this would have torch import half of itself.
        selection = torch.eye(states, layer.hidden_size, dtype=weight.dtype)
        blocks = layer.num_layers * directions
        self.states = nn.Parameter(selection.repeat(blocks, 1, 1).to(weight.device))
        """Of all units from those that are there: (layers * directions, states, hidden)."""
        self.train(layer.training)

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:  # noqa: A002  (torch's name)
        """(output, h_n), or (output, (h_n, c_n)), of the dense layer's shapes."""
        output, states = self.recurrent(input, None if hx is None else self.restricted(hx))
        if isinstance(output, PackedSequence):
            data, *order = output
            return PackedSequence(self.readout(data), *order), self.expanded(states)
        return self.readout(output), self.expanded(states)

    def flatten_parameters(self) -> None:
        """What the dense layer has under this name: one piece of memory for cuDNN."""
        self.recurrent.flatten_parameters()

    def restricted(self, states: Any) -> Any:
        """Initial states of all units as those of the recurrent layer."""
        raise NotImplementedError

    def expanded(self, states: Any) -> Any:
        """Final states of the recurrent layer as those of all units."""
        raise NotImplementedError

    def _all_units(self, states: torch.Tensor) -> torch.Tensor:
        batched = states if states.dim() == 3 else states[:, None]
        return torch.bmm(batched, self.states).reshape(*states.shape[:-1], self.hidden_size)


class FewerUnits(ReducedStates):
    """A smaller `nn.LSTM`, `nn.GRU` or `nn.RNN`. Initial states are those of the kept units."""

    def __init__(
        self, layer: Recurrent, units: int, device: torch.device | str | None = None
    ) -> None:
        """The shape, bias and dtype of `layer` with `units` in each direction of each layer of it.

        With torch's initial values, the first units kept; on `device`, or that of `layer`. Raises
        RankError for units outside 1..hidden_size.
        """
        check_ranks((units,), (layer.hidden_size,), layer)
        device = device or recurrent_weight(layer).device
        super().__init__(layer, recurrent_like(layer, units, device), units)
        blocks = layer.num_layers * directions_of(layer)
        self.register_buffer("kept", torch.arange(units).repeat(blocks, 1).to(device))

    def restricted(self, states: Any) -> Any:
        if isinstance(states, tuple):
            return tuple(self.restricted(state) for state in states)
        kept = cast(torch.Tensor, self.kept)
        if states.dim() == 3:
            kept = kept[:, None]
        return torch.take_along_dim(states, kept, dim=-1)

    def expanded(self, states: Any) -> Any:
        """Also c of an LSTM as h, which is about c times the output gate."""
        if isinstance(states, tuple):
            return tuple(self.expanded(state) for state in states)
        return self._all_units(states)


class ProjectedUnits(ReducedStates):
    """An `nn.LSTM` whose hidden states are projected to fewer (`proj_size`); all cells are kept.

    cuDNN knows such layers; oneDNN does not, so that on CPUs they are slower than the dense ones.
    """

    def __init__(
        self, layer: nn.LSTM, states: int, device: torch.device | str | None = None
    ) -> None:
        """The shape, bias and dtype of `layer`, so many states in each direction of each layer.

        With torch's initial values; on `device`, or that of `layer`. Raises RankError for states
        outside 1..hidden_size - 1.
        """
        check_ranks((states,), (layer.hidden_size - 1,), layer)
        device = device or recurrent_weight(layer).device
        super().__init__(
            layer, recurrent_like(layer, layer.hidden_size, device, proj_size=states), states
        )

    def restricted(self, states: Any) -> Any:
        hidden, cells = states
        batched = hidden if hidden.dim() == 3 else hidden[:, None]
        names = block_names(self.recurrent)
        projections = torch.stack([getattr(self.recurrent, f"weight_hr{n}") for n in names])
        projected = torch.bmm(batched, projections.mT)
        return projected.reshape(*hidden.shape[:-1], -1), cells

    def expanded(self, states: Any) -> Any:
        hidden, cells = states
        return self._all_units(hidden), cells


class FewerUnitsCell(nn.Module):
    """A smaller `nn.LSTMCell`, `nn.GRUCell` or `nn.RNNCell`, and a linear readout of all units.

    Called as the dense cell is, with the states of all units, of which it reads the kept ones.
    """

    def __init__(self, cell: Cell, units: int, device: torch.device | str | None = None) -> None:
        """The shape, bias and dtype of `cell` with so many units; on `device`, or that of `cell`.

        With torch's initial values, the first units kept. Raises RankError for units outside
        1..hidden_size.
        """
        super().__init__()
        check_ranks((units,), (cell.hidden_size,), cell)
        made: dict[str, Any] = {
            "device": device or cell.weight_hh.device,
            "dtype": cell.weight_hh.dtype,
        }
        kind = {"nonlinearity": cell.nonlinearity} if isinstance(cell, nn.RNNCell) else {}
        self.input_size, self.hidden_size = cell.input_size, cell.hidden_size
        self.recurrent = type(cell)(cell.input_size, units, cell.bias, **kind, **made)
        self.readout = nn.Linear(units, cell.hidden_size, False, **made)
        self.register_buffer("kept", torch.arange(units).to(made["device"]))
        self.train(cell.training)

    def forward(self, input: torch.Tensor, hx: Any = None) -> Any:  # noqa: A002  (torch's name)
        """h, or (h, c) of an LSTM, (batch, hidden) or (hidden,); c is read out as h is."""
        kept = cast(torch.Tensor, self.kept)
        if isinstance(hx, tuple | list):
            hx = tuple(state.index_select(-1, kept) for state in hx)
        elif hx is not None:
            hx = hx.index_select(-1, kept)
        states = self.recurrent(input, hx)
        if isinstance(states, tuple):
            return self.readout(torch.stack(states)).unbind()
        return self.readout(states)


def directions_of(layer: Recurrent | Cell) -> int:
    """1, or 2 of a bidirectional layer."""
    return 2 if isinstance(layer, RECURRENT) and layer.bidirectional else 1


def block_names(layer: Recurrent | Cell) -> list[str]:
    """How torch ends the names of the parameters of each layer and direction: `_l0_reverse`.

    In the order of the states h_n. Those of a cell have no such ending.
    """
    if isinstance(layer, CELLS):
        return [""]
    reverse = ("", "_reverse")[: directions_of(layer)]
    return [f"_l{index}{end}" for index in range(layer.num_layers) for end in reverse]


def recurrent_weight(layer: Recurrent | Cell) -> torch.Tensor:
    """The first recurrent matrix, (gates * hidden, hidden)."""
    return cast(torch.Tensor, getattr(layer, f"weight_hh{block_names(layer)[0]}"))


def input_limit(layer: Recurrent) -> int:
    """The greatest rank of the input matrices of the first layer, one upon the other."""
    rows = directions_of(layer) * len(recurrent_weight(layer))
    return min(layer.input_size, rows)


def recurrent_like(
    layer: Recurrent,
    units: int,
    device: torch.device | str,
    inputs: int | None = None,
    **kind: Any,
) -> Recurrent:
    """A layer of the shape and dtype of another, of so many units, and inputs; `kind`: settings."""
    if isinstance(layer, nn.RNN):
        kind["nonlinearity"] = layer.nonlinearity
    return type(layer)(
        layer.input_size if inputs is None else inputs,
        units,
        layer.num_layers,
        bias=layer.bias,
        batch_first=layer.batch_first,
        dropout=layer.dropout if layer.num_layers > 1 else 0.0,
        bidirectional=layer.bidirectional,
        device=device,
        dtype=recurrent_weight(layer).dtype,
        **kind,
    )
