"""Linear layers whose weight is a core multiplied by a small matrix in each of its modes."""

from collections.abc import Sequence

import torch

from rankfold.layers.modes import modes_of
from rankfold.layers.tensor_network import BONDS, INPUTS, OUTPUTS, TensorNetworkLinear, ranks_within


class TuckerLinear(TensorNetworkLinear):
    """W[o_1..o_e, i_1..i_d] = core x_1 U_1[o_1] ... x_e U_e[o_e] x_.. V_1[i_1] ... V_d[i_d].

    The core has a rank for each mode, first of the outputs; the factors are (mode, rank).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int | Sequence[int],
        in_modes: int | Sequence[int] = 2,
        out_modes: int | Sequence[int] = 2,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """One `rank` that bounds those of all modes, or each mode's, first of the outputs.

        Modes are given, or so many balanced ones (of a prime all but one are 1); there may be more
        of one side than of the other. Raises RankError for modes that do not make the features,
        and for a rank below 1 or, of a mode, above its length.
        """
        modes = modes_of(in_features, in_modes), modes_of(out_features, out_modes)
        names = OUTPUTS[: len(modes[1])] + INPUTS[: len(modes[0])]
        bonds = BONDS[: len(names)]
        ranks = ranks_within(rank, (*modes[1], *modes[0]))
        terms = [bonds, *(name + bond for name, bond in zip(names, bonds, strict=True))]
        super().__init__(modes, terms, dict(zip(bonds, ranks, strict=True)), bias, device, dtype)
