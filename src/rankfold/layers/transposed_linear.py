"""Linear layers whose weight is stored (in, out): Hugging Face's `Conv1D`, and one for ties."""

import sys
from typing import Any

import torch
from torch import nn
from torch.nn import functional


class TransposedLinear(nn.Module):
    """y = x W, with W (in, out) the parameter of another layer: what a tied weight needs."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        return functional.linear(tensor, self.weight.mT)

    def extra_repr(self) -> str:
        return f"in_features={self.weight.shape[0]}, out_features={self.weight.shape[1]}"


def is_transposed_linear(layer: nn.Module) -> bool:
    """Whether it is a `transformers.pytorch_utils.Conv1D`, which is a linear layer of GPT-2's.

    Without importing transformers: who has such a layer has imported it.
    """
    known = sys.modules.get("transformers.pytorch_utils")
    return known is not None and type(layer) is getattr(known, "Conv1D", None)


def has_features_last(layer: nn.Module) -> bool:
    """Whether the last mode of what a layer is given and gives are features, all others positions.

    So it is of linear layers; of an embedding it is so of what it gives. Convolutions have them
    first.
    """
    return isinstance(layer, nn.Linear | nn.Embedding) or is_transposed_linear(layer)


def as_linear(layer: Any) -> nn.Linear:
    """The `nn.Linear` that does what a `Conv1D` does; its parameters share that one's memory."""
    inputs, outputs = layer.weight.shape
    linear = nn.Linear(inputs, outputs, device="meta", dtype=layer.weight.dtype)
    linear.weight = nn.Parameter(layer.weight.detach().mT, layer.weight.requires_grad)
    linear.bias = layer.bias
    return linear.train(layer.training)
