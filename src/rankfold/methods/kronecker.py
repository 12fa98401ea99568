"""Sums of Kronecker products as the weight of a linear layer.

Van Loan, Pitsianis: Approximation with Kronecker products. In Linear algebra for large scale and
real-time applications (1993): of a weight whose entries are rearranged, one row for each entry of
the left factors and one column for each of the right ones, it is the truncated SVD.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from rankfold.decompose import Weights, tensor_train
from rankfold.layers import KroneckerLinear, TensorNetworkLinear, check_ranks
from rankfold.methods.alternating import Factors
from rankfold.methods.method import Rank, check_alignment
from rankfold.methods.moments import Moments
from rankfold.methods.sampled import SampledFamily
from rankfold.methods.tensor_network import (
    in_shapes_of,
    linear_form,
    linear_modes,
    network_family,
    paired,
    paired_weights,
    why_not_split,
)

_MODES = 2  # Kronecker factors


@dataclass(frozen=True)
class Kronecker:
    """W ≈ Σ_k A_k ⊗ B_k, the sides of A and B those of the weight split into two modes each.

    A rank is the number of terms; every number is a candidate, for the products are between
    multiples of the modes. Takes linear layers. It is the tensor train of two pairs of modes: in
    the weight metric, and where moments are Kronecker products over the modes, the fit is the best
    one; in other metrics alternating least squares follow.
    """

    name: ClassVar[str] = "kronecker"
    makes_chains: ClassVar[bool] = False
    alignment: int = 8

    def __post_init__(self) -> None:
        check_alignment(self.alignment)

    def why_not(self, layer: nn.Module) -> str | None:
        return why_not_split(layer)

    def fit(self, layer: nn.Linear, moments: Moments) -> SampledFamily:
        ranks = range(1, _limit(layer) + 1)
        return network_family(layer, moments, partial(_form, layer), _start, ranks)

    def skeleton(self, layer: nn.Linear, rank: Rank) -> nn.Module:
        check_ranks(rank, (_limit(layer),), layer)
        return _form(layer, rank)


def _form(layer: nn.Linear, rank: Rank) -> KroneckerLinear:
    return linear_form(KroneckerLinear, layer, rank[0], modes=_MODES)


def _limit(layer: nn.Linear) -> int:
    return min(given * made for given, made in zip(*linear_modes(layer, _MODES), strict=True))


def _start(
    form: TensorNetworkLinear, tensor: torch.Tensor, weights: Weights | None
) -> list[Factors]:
    rank = form.lengths[form.terms[0][0]]
    train = tensor_train(paired(tensor), rank, weights=paired_weights(tensor, weights))
    left, right = train.cores
    return [in_shapes_of(form, [left[0].mT, right[..., 0]])]
