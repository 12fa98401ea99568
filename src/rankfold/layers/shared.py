"""One layer for several slices of the channels."""

import torch
from torch import nn

from rankfold.layers.chain import Convolution


class SharedLayer(nn.Module):
    """A layer that each of equal slices of the channels goes through by itself.

    The slices are folded into the batch: the layer is one of torch's own, a linear one of the last
    mode or a convolution, and is loaded once for all of them.
    """

    def __init__(self, layer: nn.Linear | Convolution, slices: int) -> None:
        super().__init__()
        self.layer = layer
        self.slices = slices
        self.channels = 1 - layer.weight.dim()  # the mode that holds them, from the last

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        apart = tensor.unflatten(self.channels, (self.slices, -1))
        made = self.layer(apart.flatten(0, self.channels - 1))
        return made.unflatten(0, apart.shape[: self.channels]).flatten(
            self.channels - 1, self.channels
        )

    def extra_repr(self) -> str:
        return f"slices={self.slices}"
