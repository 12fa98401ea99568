"""A convolution whose channels are split into several modes, as a tensor train of them all."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import nn

from rankfold.layers.chain import Convolution, all_axes, dense_convolution, link
from rankfold.layers.form import check_ranks, factors_of
from rankfold.layers.modes import balanced_modes
from rankfold.layers.shared import SharedLayer

Modes = Sequence[tuple[int, int]]  # (of outputs, of inputs), pair by pair


class TrainCore(SharedLayer):
    """One core of a TT-matrix: of each pair of modes, from the rank before to the rank after.

    The features that come are (mode of inputs, others, rank before), the features that go (others,
    mode of outputs, rank after): after as many cores as there are pairs all modes are in their
    order again. The product is a linear layer of (mode of inputs, rank before) to (mode of outputs,
    rank after), for a convolution one of one place.
    """

    def __init__(
        self, product: nn.Linear | Convolution, modes: tuple[int, int], others: int
    ) -> None:
        """`modes` of (outputs, inputs), `others` the product of the other modes' lengths."""
        super().__init__(product, others)
        self.modes = modes

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        mode = self.channels
        apart = tensor.unflatten(mode, (self.modes[1], self.slices, -1))
        return super().forward(apart.transpose(mode - 2, mode - 1).flatten(mode - 2, mode))

    def core(self) -> torch.Tensor:
        """(mode of outputs, rank after, mode of inputs, rank before)."""
        made, given = self.modes
        return self.layer.weight.reshape(made, -1, given, self.layer.weight.shape[1] // given)

    def extra_repr(self) -> str:
        return f"modes={self.modes}, others={self.slices}"


class ChannelBias(nn.Module):
    """A bias by itself, where the last product is shared by channels that have their own."""

    bias: nn.Parameter | None

    def __init__(self, layer: Convolution, device: torch.device | str | None = None) -> None:
        """As many zeros as `layer` has channels of outputs; None where it has no bias."""
        super().__init__()
        self.ndim = len(layer.kernel_size)
        if layer.bias is None:
            self.register_parameter("bias", None)
        else:
            zeros = torch.zeros_like(layer.bias, device=device or layer.bias.device)
            self.bias = nn.Parameter(zeros)

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.bias is None:
            return tensor
        return tensor + self.bias.reshape(-1, *(1,) * self.ndim)


class TensorizedTrainConvolution(nn.Sequential):
    """`Conv k 1→r_0` of every input channel, then a TT-matrix of the channels, core by core.

    The TT-convolution of Garipov, Podoprikhin, Novikov, Vetrov: Ultimate tensorization (2016),
    equation 9: G_0[places] G_1[i_1, o_1] ... G_d[i_d, o_d], with the kernel's core first. Stride,
    padding and dilation are the first convolution's. The bias comes last, by itself.
    """

    def __init__(
        self,
        layer: Convolution,
        modes: Modes,
        rank: int,
        device: torch.device | str | None = None,
    ) -> None:
        """The geometry and dtype of `layer`, torch's initial values, a bias of 0 if it has one.

        `rank` bounds the ranks of all bonds, each of which is no greater than what makes it exact.
        On `device`, or that of `layer`. Raises RankError for a rank outside 1..max of
        `tensorized_limits`.
        """
        limits = tensorized_limits(layer, modes)
        check_ranks((rank,), (max(limits),), layer)
        ranks = [*(min(rank, limit) for limit in limits), 1]
        spatial = link(layer, 1, ranks[0], all_axes(layer), device=device)
        super().__init__(SharedLayer(spatial, layer.in_channels))
        others = layer.in_channels
        for (before, after), (made, given) in zip(pairwise(ranks), modes, strict=True):
            product = link(layer, given * before, made * after, device=device)
            others //= given
            self.append(TrainCore(product, (made, given), others))
            others *= made
        self.append(ChannelBias(layer, device))

    def to_dense(self) -> Convolution:
        """The `nn.Conv1d`, `2d` or `3d` that this represents."""
        _, *cores, _ = self
        filters = factors_of(self)[0].weight[:, 0]
        matrices = train_matrices(cast("list[TrainCore]", cores))
        return dense_convolution(self, torch.einsum("roi,r...->oi...", matrices, filters))


def train_matrices(cores: Sequence[TrainCore]) -> torch.Tensor:
    """What cores of a TT-matrix stand for: (rank before the first, outputs, inputs)."""
    product = None
    for core in cores:
        factor = core.core().permute(3, 0, 2, 1)  # (rank before, outputs, inputs, rank after)
        if product is None:
            product = factor
        else:
            apart = torch.einsum("zoir,rabs->zoaibs", product, factor)
            product = apart.flatten(3, 4).flatten(1, 2)
    assert product is not None
    return product[..., 0]


def channel_modes(layer: Convolution, count: int) -> list[tuple[int, int]]:
    """The pairs of modes, (of outputs, of inputs), that the channels are split into.

    Those of the outputs descend and those of the inputs ascend, so that the pairs are of about one
    size.
    """
    made, given = (balanced_modes(n, count) for n in (layer.out_channels, layer.in_channels))
    return list(zip(reversed(made), given, strict=True))


def tensorized_limits(layer: Convolution, modes: Modes) -> tuple[int, ...]:
    """The greatest rank of each bond: behind the kernel's core, and between each two of modes."""
    lengths = [math.prod(layer.kernel_size), *(made * given for made, given in modes)]
    return tuple(
        min(math.prod(lengths[:bond]), math.prod(lengths[bond:])) for bond in range(1, len(lengths))
    )
