"""Recurrent layers of fewer states, which give the outputs of all the units there were."""

from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from rankfold.layers.form import check_ranks

Recurrent = nn.LSTM | nn.GRU | nn.RNN
RECURRENT = (nn.LSTM, nn.GRU, nn.RNN)


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
        weight = cast(torch.Tensor, recurrent.weight_hh_l0)
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
        device = device or cast(torch.Tensor, layer.weight_hh_l0).device
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
        device = device or cast(torch.Tensor, layer.weight_hh_l0).device
        super().__init__(
            layer, recurrent_like(layer, layer.hidden_size, device, proj_size=states), states
        )

    def restricted(self, states: Any) -> Any:
        hidden, cells = states
        batched = hidden if hidden.dim() == 3 else hidden[:, None]
        names = block_names(self.recurrent)
        projections = torch.stack([getattr(self.recurrent, f"weight_hr_{n}") for n in names])
        projected = torch.bmm(batched, projections.mT)
        return projected.reshape(*hidden.shape[:-1], -1), cells

    def expanded(self, states: Any) -> Any:
        hidden, cells = states
        return self._all_units(hidden), cells


def directions_of(layer: Recurrent) -> int:
    """1, or 2 of a bidirectional layer."""
    return 2 if layer.bidirectional else 1


def block_names(layer: Recurrent) -> list[str]:
    """How torch ends the names of the parameters of each layer and direction: `l0_reverse`.

    In the order of the states h_n.
    """
    reverse = ("", "_reverse")[: directions_of(layer)]
    return [f"l{index}{end}" for index in range(layer.num_layers) for end in reverse]


def recurrent_like(
    layer: Recurrent, units: int, device: torch.device | str, **kind: Any
) -> Recurrent:
    """A layer of the shape and dtype of another, of so many units; `kind`: further settings."""
    if isinstance(layer, nn.RNN):
        kind["nonlinearity"] = layer.nonlinearity
    return type(layer)(
        layer.input_size,
        units,
        layer.num_layers,
        bias=layer.bias,
        batch_first=layer.batch_first,
        dropout=layer.dropout if layer.num_layers > 1 else 0.0,
        bidirectional=layer.bidirectional,
        device=device,
        dtype=cast(torch.Tensor, layer.weight_hh_l0).dtype,
        **kind,
    )
