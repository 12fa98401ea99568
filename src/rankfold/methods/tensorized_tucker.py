"""Tucker decomposition of the weight of a linear layer whose sides are split into modes.

Tucker: Some mathematical notes on three-mode factor analysis. Psychometrika 31 (1966). Of layers of
trained networks: Kim et al. 2016, whose modes are the channels of convolutions.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from rankfold.decompose import Weights, tucker
from rankfold.layers import TensorNetworkLinear, TuckerLinear, check_ranks
from rankfold.methods.alternating import Factors
from rankfold.methods.method import Rank, check_alignment
from rankfold.methods.moments import Moments
from rankfold.methods.sampled import SampledFamily
from rankfold.methods.tensor_network import (
    linear_form,
    linear_modes,
    network_family,
    why_not_split,
)


@dataclass(frozen=True)
class TensorizedTucker:
    """W ≈ core x_1 U_1 x_2 U_2 x_3 V_1 x_4 V_2: each side is split into so many `modes`.

    The one rank bounds those of all modes; every number is a candidate, for the products are
    between multiples of the modes. Takes linear layers. The core is what mixes, and holds nearly
    all parameters: a power of the rank.
    """

    name: ClassVar[str] = "tensorized-tucker"
    makes_chains: ClassVar[bool] = False
    alignment: int = 8
    modes: int = 2

    def __post_init__(self) -> None:
        check_alignment(self.alignment)
        if type(self.modes) is not int or self.modes < 1:
            raise ValueError(f"modes is an integer of at least 1, not {self.modes!r:.40}")

    def why_not(self, layer: nn.Module) -> str | None:
        return why_not_split(layer)

    def fit(self, layer: nn.Linear, moments: Moments) -> SampledFamily:
        ranks = range(1, self._limit(layer) + 1)
        return network_family(layer, moments, partial(self._form, layer), _start, ranks)

    def skeleton(self, layer: nn.Linear, rank: Rank) -> nn.Module:
        check_ranks(rank, (self._limit(layer),), layer)
        return self._form(layer, rank)

    def _form(self, layer: nn.Linear, rank: Rank) -> TuckerLinear:
        return linear_form(TuckerLinear, layer, rank[0], modes=self.modes)

    def _limit(self, layer: nn.Linear) -> int:
        given, made = linear_modes(layer, self.modes)
        return max(*given, *made)


def _start(
    form: TensorNetworkLinear, tensor: torch.Tensor, weights: Weights | None
) -> list[Factors]:
    found = tucker(tensor, form.factors[0].shape, weights=weights)
    return [(found.core, *found.factors)]
