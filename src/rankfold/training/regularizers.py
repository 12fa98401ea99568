"""Penalties of weights, for training of low rank: what `rankfold.recover(penalty=...)` takes.

Each is a frozen dataclass, called with the model, that gives a scalar. Several at once:
`penalty=lambda model: decay(model) + orthogonality(model)`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import nn

from rankfold.batches import device_of
from rankfold.errors import RankfoldError
from rankfold.layers import StructuredLinear, squared_norm_of_chain
from rankfold.training.chains import Chain, chains_of, dense_layers, factorized_layers


@dataclass(frozen=True)
class Orthogonality:
    """`strength` · Σ ‖ÛᵀÛ - I‖², of the factors at both ends of every chain.

    Û are the columns of a factor, one for each of the rank, at unit length: that they are long or
    short costs nothing, that they say the same does. Of chains whose links have all the same groups
    (two factors, Tucker, separable, tensor train; group by group); of the others (CP, flattened)
    the terms are not orthogonal. Factors in the middle, Tucker's core, are left.
    """

    strength: float = 1e-3
    layers: str = "*"  # a shell-style pattern of their names

    def __post_init__(self) -> None:
        _check(self.strength)

    def __call__(self, model: nn.Module) -> torch.Tensor:
        return self.strength * _sum(
            (
                _correlation(columns)
                for _, form in factorized_layers(model, self.layers)
                for chain in chains_of(form)
                for columns in _ends(chain)
            ),
            model,
        )


@dataclass(frozen=True)
class NuclearNorm:
    """`strength` · Σ ‖W‖_*, the sum of singular values: of lower rank is what has less of it.

    Of two factors ½(‖U‖² + ‖V‖²), which is the nuclear norm of U V at its least over all factors
    of the same product (Srebro, Rennie, Jaakkola: Maximum-margin matrix factorization. NeurIPS
    2004): where training ends it is that. Of dense linear layers and convolutions, unfolded to
    (out, in * kernel), group by group, their singular values, whose subgradient takes a
    decomposition for each step. Longer chains are left.
    """

    strength: float = 1e-4
    layers: str = "*"  # a shell-style pattern of their names

    def __post_init__(self) -> None:
        _check(self.strength)

    def __call__(self, model: nn.Module) -> torch.Tensor:
        factors = [
            weight.square().sum() / 2
            for _, form in factorized_layers(model, self.layers)
            for chain in chains_of(form)
            if len(chain.links) == 2 and chain.groups is not None
            for weight, _ in chain.links
        ]
        dense = [
            torch.linalg.svdvals(weight.flatten(1).unflatten(0, (groups, -1))).sum()
            for _, weight, groups in dense_layers(model, self.layers)
        ]
        return self.strength * _sum([*factors, *dense], model)


@dataclass(frozen=True)
class FrobeniusDecay:
    """`strength` / 2 · Σ ‖W‖² of the weights that layers represent, not of their factors.

    What weight decay is to a dense network; that of the factors would be a nuclear norm, and drive
    ranks down. Khodak, Tenenholtz, Mackey, Fusi: Initialization and regularization of factorized
    neural layers. ICLR 2021. Of chains from the Gram matrices of the factors, the product is never
    made; of layers of small tensors it is. Of dense linear layers and convolutions it is weight
    decay itself.
    """

    strength: float = 1e-4
    layers: str = "*"  # a shell-style pattern of their names

    def __post_init__(self) -> None:
        _check(self.strength)

    def __call__(self, model: nn.Module) -> torch.Tensor:
        represented = [
            square
            for _, form in factorized_layers(model, self.layers)
            for square in _squares_of(form)
        ]
        dense = [weight.square().sum() for _, weight, _ in dense_layers(model, self.layers)]
        return self.strength / 2 * _sum([*represented, *dense], model)


def _squares_of(form: nn.Module) -> list[torch.Tensor]:
    if isinstance(form, StructuredLinear):
        return [form.to_weight().square().sum()]
    return [squared_norm_of_chain(chain.links) for chain in chains_of(form)]


def _ends(chain: Chain) -> list[torch.Tensor]:
    """The first and the last factor as (groups, rank, the other sides): rows are of the rank."""
    groups = chain.groups
    if groups is None:
        return []
    (first, _), (last, _) = chain.links[0], chain.links[-1]
    by_group = last.unflatten(0, (groups, -1)).transpose(1, 2)
    return [first.flatten(1).unflatten(0, (groups, -1)), by_group.flatten(2)]


def _correlation(rows: torch.Tensor) -> torch.Tensor:
    """Of (groups, rank, n): the squared cosines of all pairs of different rows of a group."""
    unit = nn.functional.normalize(rows, dim=2)
    gram = unit @ unit.mT
    return (gram - torch.diag_embed(gram.diagonal(dim1=1, dim2=2))).square().sum()


def _sum(terms: Iterable[torch.Tensor], model: nn.Module) -> torch.Tensor:
    found: Any = sum(terms)
    return found if isinstance(found, torch.Tensor) else torch.zeros((), device=device_of(model))


def _check(strength: float) -> None:
    if not (isfinite(strength) and strength >= 0):
        raise RankfoldError(f"strength={strength} must be a finite number, at least 0")
