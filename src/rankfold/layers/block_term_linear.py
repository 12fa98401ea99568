"""Linear layers whose weight is a sum of Tucker decompositions over pairs of modes."""

from collections.abc import Sequence

import torch

from rankfold.layers.modes import paired_modes
from rankfold.layers.tensor_network import (
    BONDS,
    INPUTS,
    OUTPUTS,
    TERMS,
    TensorNetworkLinear,
    check_count,
    ranks_within,
)


class BlockTermLinear(TensorNetworkLinear):
    """W[o_1..o_d, i_1..i_d] = Σ_k core_k x_1 A_k1[o_1, i_1] x_2 ... x_d A_kd[o_d, i_d].

    Ye, Wang, Li, Chen, Zhe, Chu, Xu: Learning compact recurrent neural networks with block-term
    tensor decomposition. CVPR 2018, section 3. The core of all blocks is (blocks, rank of each
    pair), the factors are (blocks, mode of outputs, mode of inputs, rank).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        blocks: int,
        rank: int | Sequence[int],
        in_modes: int | Sequence[int] = 3,
        out_modes: int | Sequence[int] = 3,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """One `rank` that bounds those of all pairs of modes, or each pair's.

        Modes are given, or so many balanced ones (of a prime all but one are 1). Raises RankError
        for modes that do not make the features or pairs, for no blocks, and for a rank below 1 or,
        of a pair, above its size.
        """
        modes = paired_modes(in_features, out_features, in_modes, out_modes)
        check_count(blocks, "blocks")
        pairs = [given * made for given, made in zip(*modes, strict=True)]
        bonds = BONDS[: len(pairs)]
        lengths = dict(zip(bonds, ranks_within(rank, pairs), strict=True))
        terms = [
            TERMS + bonds,
            *(TERMS + o + i + bond for o, i, bond in zip(OUTPUTS, INPUTS, bonds, strict=False)),
        ]
        super().__init__(modes, terms, {TERMS: blocks, **lengths}, bias, device, dtype)
