"""Linear layers whose weight is a sum of terms of rank one, of all its modes."""

from collections.abc import Sequence

import torch

from rankfold.layers.modes import modes_of
from rankfold.layers.tensor_network import INPUTS, OUTPUTS, TERMS, TensorNetworkLinear, check_count


class CPLinear(TensorNetworkLinear):
    """W[o_1..o_e, i_1..i_d] = Σ_k A_1[o_1, k] ... A_e[o_e, k] B_1[i_1, k] ... B_d[i_d, k].

    Two factors of low rank whose columns are Kronecker products. As in Lebedev et al. 2015, of a
    matrix whose sides are split into modes.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        in_modes: int | Sequence[int] = 3,
        out_modes: int | Sequence[int] = 3,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Of so many terms as `rank` says.

        Modes are given, or so many balanced ones (of a prime all but one are 1); there may be more
        of one side than of the other. Raises RankError for modes that do not make the features,
        and for a rank below 1.
        """
        modes = modes_of(in_features, in_modes), modes_of(out_features, out_modes)
        check_count(rank, "terms")
        names = OUTPUTS[: len(modes[1])] + INPUTS[: len(modes[0])]
        terms = [name + TERMS for name in names]
        super().__init__(modes, terms, {TERMS: rank}, bias, device, dtype)
