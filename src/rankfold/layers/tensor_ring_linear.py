"""Linear layers whose weight is a tensor ring: of the modes of the outputs, then of the inputs."""

import math
from collections.abc import Sequence

import torch

from rankfold.layers.modes import modes_of
from rankfold.layers.tensor_network import (
    BONDS,
    INPUTS,
    OUTPUTS,
    TensorNetworkLinear,
    ranks_within,
)
from rankfold.layers.tensor_train_linear import train_limits_of


class TensorRingLinear(TensorNetworkLinear):
    """W[o_1..o_e, i_1..i_d] = trace(G_1[o_1] ... G_e[o_e] H_1[i_1] ... H_d[i_d]), of matrices.

    Wang, Sun, Eriksson, Wang, Aggarwal: Wide compression: tensor ring nets. CVPR 2018, section 3.1.
    The cores are (rank before, mode, rank after); the last rank is the first.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int | Sequence[int],
        in_modes: int | Sequence[int] = 3,
        out_modes: int | Sequence[int] = 3,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """One `rank` that bounds all bonds, or the rank before each core.

        Modes are given, or so many balanced ones (of a prime all but one are 1); there may be more
        of one side than of the other. Raises RankError for modes that do not make the features,
        and for a rank below 1 or, of a bond, above `ring_limits`.
        """
        modes = modes_of(in_features, in_modes), modes_of(out_features, out_modes)
        first = rank if isinstance(rank, int) else next(iter(rank), 0)
        limits = ring_limits(*modes, first)
        ranks = ranks_within(rank, limits)
        names = OUTPUTS[: len(modes[1])] + INPUTS[: len(modes[0])]
        bonds = [*BONDS[: len(names)], BONDS[0]]
        terms = [bonds[place] + name + bonds[place + 1] for place, name in enumerate(names)]
        lengths = dict(zip(bonds[:-1], ranks, strict=True))
        super().__init__(modes, terms, lengths, bias, device, dtype)


def ring_limits(in_modes: Sequence[int], out_modes: Sequence[int], first: int) -> tuple[int, ...]:
    """The greatest rank before each core; of the others for this rank before the first.

    With any first rank the others suffice for any matrix: they do for a train, whose first rank
    is 1, and none needs to be greater than the greatest of that.
    """
    lengths = [*out_modes, *in_modes]
    most = min(math.prod(out_modes), math.prod(in_modes))
    train = train_limits_of(lengths)
    first = max(1, min(first, most))
    return most, *(min(first * limit, max(train)) for limit in train)
