"""A recurrent layer behind a linear one that makes its inputs fewer."""

from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from rankfold.layers.form import check_ranks
from rankfold.layers.recurrent import (
    Recurrent,
    block_names,
    directions_of,
    input_limit,
    recurrent_like,
    recurrent_weight,
)


class ProjectedInputs(nn.Module):
    """An `nn.LSTM`, `nn.GRU` or `nn.RNN` of fewer inputs, all steps' made by one product.

    Called as the dense layer is, with the same shapes and states.
    """

    def __init__(
        self, layer: Recurrent, rank: int, device: torch.device | str | None = None
    ) -> None:
        """The shape, bias and dtype of `layer`, with `rank` inputs; on `device`, or its own.

        With torch's initial values. Raises RankError for a rank outside 1..min(inputs, gates *
        hidden * directions).
        """
        check_ranks((rank,), (input_limit(layer),), layer)
        super().__init__()
        weight = recurrent_weight(layer)
        device = device or weight.device
        self.input_size, self.hidden_size = layer.input_size, layer.hidden_size
        self.num_layers, self.batch_first = layer.num_layers, layer.batch_first
        self.bidirectional = layer.bidirectional
        self.projection = nn.Linear(layer.input_size, rank, False, device, weight.dtype)
        self.recurrent = recurrent_like(layer, layer.hidden_size, device, inputs=rank)
        self.train(layer.training)

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:  # noqa: A002  (torch's name)
        """What the dense layer gives: (output, h_n), or (output, (h_n, c_n))."""
        if isinstance(input, PackedSequence):
            data, *order = input
            return self.recurrent(PackedSequence(self.projection(data), *order), hx)
        return self.recurrent(self.projection(input), hx)

    def flatten_parameters(self) -> None:
        """What the dense layer has under this name: one piece of memory for cuDNN."""
        self.recurrent.flatten_parameters()

    def to_dense(self) -> Recurrent:
        """The recurrent layer that this one represents, with copies of its parameters."""
        recurrent = self.recurrent
        dense: Any = recurrent_like(
            recurrent, self.hidden_size, recurrent_weight(recurrent).device, inputs=self.input_size
        )
        dense.load_state_dict(recurrent.state_dict() | self._input_weights())
        return dense.train(self.training)

    def _input_weights(self) -> dict[str, torch.Tensor]:
        projection = self.projection.weight.detach()
        names = [f"weight_ih{end}" for end in block_names(self.recurrent)]
        return {
            name: cast(torch.Tensor, getattr(self.recurrent, name)).detach() @ projection
            for name in names[: directions_of(self.recurrent)]
        }
