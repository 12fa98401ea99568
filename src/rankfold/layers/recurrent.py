"""A recurrent layer with fewer hidden units, which gives the outputs of all of them."""

from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from rankfold.layers.form import check_ranks

Recurrent = nn.LSTM | nn.GRU | nn.RNN
RECURRENT = (nn.LSTM, nn.GRU, nn.RNN)


class FewerUnits(nn.Module):
    """A smaller `nn.LSTM`, `nn.GRU` or `nn.RNN`, and a linear readout of all units from its own.

    Called as the dense layer is, with the same shapes: a sequence, batched or not, or a
    `PackedSequence`, and initial states of all units, of which those of the kept ones count: a
    sequence can be run in parts. The recurrence is torch's fused one. No layer of the dense one's
    size does exactly the same: there is no `to_dense`.
    """

    def __init__(
        self, layer: Recurrent, units: int, device: torch.device | str | None = None
    ) -> None:
        """The shape, bias and dtype of `layer` with `units` in each direction of each layer of it.

        With torch's initial values, the first units kept; on `device`, or that of `layer`. Raises
        RankError for units outside 1..hidden_size.
        """
        check_ranks((units,), (layer.hidden_size,), layer)
        super().__init__()
        weight = cast(torch.Tensor, layer.weight_hh_l0)
        device, dtype = device or weight.device, weight.dtype
        self.input_size, self.hidden_size = layer.input_size, layer.hidden_size
        self.num_layers, self.batch_first = layer.num_layers, layer.batch_first
        self.bidirectional = layer.bidirectional
        directions = directions_of(layer)
        blocks = layer.num_layers * directions
        self.recurrent = _smaller(layer, units, device)
        self.readout = nn.Linear(
            directions * units, directions * layer.hidden_size, False, device, dtype
        )
        # Made on the CPU: on the meta device these two would have torch import half of itself.
        selection = torch.eye(units, layer.hidden_size, dtype=dtype).repeat(blocks, 1, 1)
        self.states = nn.Parameter(selection.to(device))  # of all units from the kept
        self.register_buffer("kept", torch.arange(units).repeat(blocks, 1).to(device))
        self.train(layer.training)

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:  # noqa: A002  (torch's name)
        """(output, h_n), or (output, (h_n, c_n)), of the dense layer's shapes."""
        output, states = self.recurrent(input, None if hx is None else self._restricted(hx))
        if isinstance(output, PackedSequence):
            data, *order = output
            return PackedSequence(self.readout(data), *order), self._expanded(states)
        return self.readout(output), self._expanded(states)

    def flatten_parameters(self) -> None:
        """What the dense layer has under this name: one piece of memory for cuDNN."""
        self.recurrent.flatten_parameters()

    def _restricted(self, states: Any) -> Any:
        """Of all units to the kept ones."""
        if isinstance(states, tuple):
            return tuple(self._restricted(state) for state in states)
        kept = cast(torch.Tensor, self.kept)
        if states.dim() == 3:
            kept = kept[:, None]
        return torch.take_along_dim(states, kept, dim=-1)

    def _expanded(self, states: Any) -> Any:
        """Of the kept units to all; c of an LSTM as h, which is about c times the output gate."""
        if isinstance(states, tuple):
            return tuple(self._expanded(state) for state in states)
        batched = states if states.dim() == 3 else states[:, None]
        return torch.bmm(batched, self.states).reshape(*states.shape[:-1], self.hidden_size)


def directions_of(layer: Recurrent) -> int:
    """1, or 2 of a bidirectional layer."""
    return 2 if layer.bidirectional else 1


def block_names(layer: Recurrent) -> list[str]:
    """How torch ends the names of the parameters of each layer and direction: `l0_reverse`.

    In the order of the states h_n.
    """
    reverse = ("", "_reverse")[: directions_of(layer)]
    return [f"l{index}{end}" for index in range(layer.num_layers) for end in reverse]


def _smaller(layer: Recurrent, units: int, device: torch.device | str) -> Recurrent:
    kind: dict[str, Any] = {}
    if isinstance(layer, nn.RNN):
        kind = {"nonlinearity": layer.nonlinearity}
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
