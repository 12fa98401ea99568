"""A layer that reads some of its input channels and ignores the others."""

from typing import cast

import torch
from torch import nn

from rankfold.layers.chain import Convolution, all_axes, dense_convolution, link
from rankfold.layers.form import Dense, check_ranks, fill_dense


class ChannelSelection(nn.Module):
    """Some channels of a tensor, in an order of their own: no parameters, no products."""

    channels: torch.Tensor  # (selected,), int64

    def __init__(
        self, channels: torch.Tensor, mode: int, device: torch.device | str | None = None
    ) -> None:
        """Of the mode that holds the channels, counted from the last: -1 for features."""
        super().__init__()
        self.mode = mode
        self.register_buffer("channels", channels.to(device, copy=True))

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        last = tensor.movedim(self.mode, -1)
        if tensor.is_contiguous() or not last.is_contiguous():
            return tensor.index_select(self.mode, self.channels)
        # In channels-last format torch selects several times as fast from a matrix.
        rows = last.flatten(0, -2).index_select(1, self.channels)
        return rows.unflatten(0, last.shape[:-1]).movedim(-1, self.mode)

    def extra_repr(self) -> str:
        return f"{len(self.channels)}, mode={self.mode}"


class SelectedChannels(nn.Sequential):
    """`ChannelSelection`, then the layer of the selected channels alone."""

    def __init__(
        self,
        layer: Dense,
        channels: torch.Tensor,
        device: torch.device | str | None = None,
    ) -> None:
        """The geometry, bias and dtype of `layer`, with torch's initial values.

        `channels` (selected,) are int64; on `device`, or that of `layer`. Raises RankError for
        none, or more than there are.
        """
        selected, bias = len(channels), layer.bias is not None
        self_device = device or layer.weight.device
        if isinstance(layer, nn.Linear):
            check_ranks((selected,), (layer.in_features,), layer)
            last: nn.Module = nn.Linear(
                selected, layer.out_features, bias, self_device, layer.weight.dtype
            )
        else:
            check_ranks((selected,), (layer.in_channels,), layer)
            axes = all_axes(layer)
            last = link(layer, selected, layer.out_channels, axes, bias=bias, device=device)
        mode = 1 - layer.weight.dim()
        super().__init__(ChannelSelection(channels, mode, self_device), last)
        self.inputs = layer.weight.shape[1]

    def to_dense(self) -> nn.Linear | Convolution:
        """The `nn.Linear`, `nn.Conv1d`, `2d` or `3d` that this represents."""
        selection, last = cast(ChannelSelection, self[0]), cast(Dense, self[1])
        weight = last.weight.detach()
        whole = weight.new_zeros(len(weight), self.inputs, *weight.shape[2:])
        whole[:, selection.channels] = weight
        only_last = nn.Sequential(last).train(self.training)
        if not isinstance(last, nn.Linear):
            return dense_convolution(only_last, whole)
        dense = nn.Linear(self.inputs, len(weight), last.bias is not None, "meta", weight.dtype)
        fill_dense(dense, whole, only_last)
        return dense
