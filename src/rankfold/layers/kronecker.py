"""Linear layers whose weight is a sum of Kronecker products."""

from collections.abc import Sequence

import torch

from rankfold.errors import RankError
from rankfold.layers.modes import paired_modes
from rankfold.layers.tensor_network import INPUTS, OUTPUTS, TERMS, TensorNetworkLinear, check_count


class KroneckerLinear(TensorNetworkLinear):
    """W = Σ_k A_k ⊗ B_k ⊗ ..., each of the sizes of one pair of modes.

    Van Loan, Pitsianis: Approximation with Kronecker products. 1993. The factors are (terms, mode
    of outputs, mode of inputs).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        in_modes: int | Sequence[int] = 2,
        out_modes: int | Sequence[int] = 2,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Of so many terms as `rank` says, each of as many factors as there are pairs of modes.

        Modes are given, or so many balanced ones (of a prime all but one are 1). Raises RankError
        for modes that do not make the features or at least two pairs, and for a rank below 1.
        """
        modes = paired_modes(in_features, out_features, in_modes, out_modes)
        if len(modes[0]) < 2:
            raise RankError("a Kronecker product takes at least two pairs of modes")
        check_count(rank, "terms")
        terms = [TERMS + OUTPUTS[place] + INPUTS[place] for place in range(len(modes[0]))]
        super().__init__(modes, terms, {TERMS: rank}, bias, device, dtype)
