"""Recurrent layers whose products of inputs are made of small tensors: to train from scratch."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.func import functional_call

from rankfold.errors import UnsupportedLayerError
from rankfold.layers.recurrent import Recurrent, block_names, directions_of, recurrent_like
from rankfold.layers.structured_linear import StructuredLinear


class StructuredRecurrent(nn.Module):
    """An `nn.LSTM`, `nn.GRU` or `nn.RNN` whose matrix of the inputs is one structured layer.

    That of all gates together, of the first layer, in each direction; the rest is as it was:

        lstm = StructuredRecurrent(
            nn.LSTM(2_304, 128, batch_first=True),
            lambda inputs, outputs: BlockTermLinear(inputs, outputs, 2, 3, bias=False),
        )

    Yang, Krompass, Tresp: Tensor-train recurrent neural networks for video classification. ICML
    2017; Ye et al. 2018 (block terms); Pan et al.: Compressing recurrent neural networks with
    tensor ring for action recognition. AAAI 2019. Where inputs are wide, nearly all parameters are
    in this matrix. It is called as the recurrent layer is and does as that does. The recurrence is
    torch's fused one: the matrix is written out, once for all steps, which costs little beside
    them; in eval mode it is kept.
    """

    def __init__(self, recurrent: Recurrent, make: Callable[[int, int], StructuredLinear]) -> None:
        """Takes over `recurrent`, and removes its matrices of the inputs.

        `make` is called with their numbers of inputs and of outputs, once for each direction. What
        it gives is put on the device and in the dtype of the recurrent layer. Raises
        UnsupportedLayerError for a structured layer of other sizes or with a bias, which the
        recurrent layer has.
        """
        super().__init__()
        old = [
            (f"weight_ih{end}", recurrent.get_parameter(f"weight_ih{end}"))
            for end in block_names(recurrent)[: directions_of(recurrent)]
        ]
        self.recurrent, self.inputs = recurrent, nn.ModuleDict()
        for name, weight in old:
            outputs, inputs = weight.shape
            layer = make(inputs, outputs)
            if (layer.in_features, layer.out_features) != (inputs, outputs):
                raise UnsupportedLayerError(
                    f"{inputs} inputs to {outputs} outputs are needed, not {layer}"
                )
            if layer._bias is not None:
                raise UnsupportedLayerError(
                    "the recurrent layer has the bias: give the structured one bias=False"
                )
            self.inputs[name] = layer.to(weight.device, weight.dtype)
            delattr(recurrent, name)
        self._forget()
        self.train(recurrent.training)

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:  # noqa: A002  (torch's name)
        """(output, h_n), or (output, (h_n, c_n)), as of the recurrent layer."""
        written = {
            name: cast(StructuredLinear, layer).written_out() for name, layer in self.inputs.items()
        }
        try:
            return cast("tuple[Any, Any]", functional_call(self.recurrent, written, (input, hx)))
        finally:
            self._forget()

    def to_dense(self) -> Recurrent:
        """The recurrent layer that this represents, with copies of its parameters."""
        own = self.recurrent
        kind = {"proj_size": own.proj_size} if own.proj_size else {}
        device = cast(torch.Tensor, own.weight_hh_l0).device
        dense = recurrent_like(own, own.hidden_size, device, **kind)
        state = {name: value.clone() for name, value in self.recurrent.state_dict().items()}
        for name, layer in self.inputs.items():
            state[name] = cast(StructuredLinear, layer).to_weight().detach()
        dense.load_state_dict(state)
        return dense.train(self.training)

    def _forget(self) -> None:
        """Of the weights that torch's layer remembers from its last call, those written out."""
        for place, name in enumerate(self.recurrent._flat_weights_names):
            if name in self.inputs:
                self.recurrent._flat_weights[place] = None
