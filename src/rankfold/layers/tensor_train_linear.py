"""Linear layers whose weight is a TT-matrix: a tensor train of pairs of modes."""

import math
from collections.abc import Sequence

import torch

from rankfold.layers.modes import paired_modes
from rankfold.layers.tensor_network import (
    BONDS,
    INPUTS,
    OUTPUTS,
    TensorNetworkLinear,
    ranks_within,
)


class TensorTrainLinear(TensorNetworkLinear):
    """W[o_1..o_d, i_1..i_d] = G_1[o_1, i_1] G_2[o_2, i_2] ... G_d[o_d, i_d], products of matrices.

    Novikov, Podoprikhin, Osokin, Vetrov: Tensorizing neural networks. NeurIPS 2015. The cores are
    (rank before, mode of outputs, mode of inputs, rank after), without the ranks of 1 at the ends.
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
        """One `rank` that bounds all bonds, or each bond's.

        Modes are given, or so many balanced ones (of a prime all but one are 1). Raises RankError
        for modes that do not make the features or pairs, and for a rank below 1 or, of a bond,
        above `train_matrix_limits`.
        """
        modes = paired_modes(in_features, out_features, in_modes, out_modes)
        limits = train_matrix_limits(*modes)
        ranks = ranks_within(rank, limits)
        bonds = ["", *BONDS[: len(limits)], ""]
        terms = [
            bonds[place] + OUTPUTS[place] + INPUTS[place] + bonds[place + 1]
            for place in range(len(modes[0]))
        ]
        lengths = dict(zip(bonds[1:-1], ranks, strict=True))
        super().__init__(modes, terms, lengths, bias, device, dtype)


def train_matrix_limits(in_modes: Sequence[int], out_modes: Sequence[int]) -> tuple[int, ...]:
    """The greatest rank of each bond: a train of these is any matrix."""
    return train_limits_of([given * made for given, made in zip(in_modes, out_modes, strict=True)])


def train_limits_of(lengths: Sequence[int]) -> tuple[int, ...]:
    """The greatest rank of each bond of a train of modes of these lengths."""
    return tuple(
        min(math.prod(lengths[:bond]), math.prod(lengths[bond:])) for bond in range(1, len(lengths))
    )
