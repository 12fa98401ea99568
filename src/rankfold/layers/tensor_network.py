"""Linear layers whose weight is a tensor network: of modes of inputs and outputs, and of bonds.

The features of both sides are split into modes; a network of small tensors, the factors, has an
index for each of these, and others that are summed over. Each form of it is a subclass.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional

from rankfold.errors import RankError
from rankfold.layers.contraction import ROWS, plan_contraction
from rankfold.layers.structured_linear import StructuredLinear

# The letters of the modes of inputs and outputs, and of bonds; k counts terms or blocks.
INPUTS, OUTPUTS, BONDS, TERMS = "abcdefgh", "ABCDEFGH", "lmnopqrstuvwxy", "k"


class TensorNetworkLinear(StructuredLinear):
    """y = W x + b, W (out, in) a tensor network: `torch.einsum` of the factors.

    The products of rows of inputs are made in the order that costs least for their number (see
    `rankfold.layers.contraction`); for many rows the whole weight may come first.
    """

    def __init__(
        self,
        modes: tuple[Sequence[int], Sequence[int]],
        terms: Sequence[str],
        lengths: Mapping[str, int],
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """`modes` of inputs and outputs, the factors' indices, and the lengths of the bonds.

        Each mode is an index of exactly one factor.
        """
        self.in_modes, self.out_modes = (tuple(side) for side in modes)
        self.terms = tuple(terms)
        given, made = INPUTS[: len(self.in_modes)], OUTPUTS[: len(self.out_modes)]
        sides = zip(given + made, self.in_modes + self.out_modes, strict=True)
        self.lengths = {**dict(sides), **lengths}
        factors = ",".join(terms)
        self._rows = plan_contraction(f"{ROWS}{given},{factors}->{ROWS}{made}", self.lengths)
        self._weight = plan_contraction(f"{factors}->{made}{given}", self.lengths)
        shapes = [[self.lengths[index] for index in term] for term in terms]
        in_features, out_features = math.prod(self.in_modes), math.prod(self.out_modes)
        super().__init__(in_features, out_features, shapes, bias, device, dtype)

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        rows = math.prod(tensor.shape[:-1])
        if not self.keeps_weight and self._rows.order_for(rows).weight_first:
            return functional.linear(tensor, self.to_weight(), self._bias)
        return super().forward(tensor)

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        count = rows.shape[0]  # len would fix it in a program that is made for any number
        split = rows.reshape(count, *self.in_modes)
        return self._rows(split, *self.factors).reshape(count, self.out_features)

    def to_weight(self) -> torch.Tensor:
        return self.weight_of(*self.factors)

    def weight_of(self, *factors: torch.Tensor) -> torch.Tensor:
        """The weight, (out, in), that other factors of these shapes give."""
        return self._weight(*factors).reshape(self.out_features, self.in_features)

    @torch.no_grad()
    def reset_parameters(self, gain: float = 1.0) -> None:
        """Random factors whose weight has entries of mean square gain² / in; zero bias.

        Independent factors give this on average alone: a product of few small tensors is now far
        too large, now far too small. So they are scaled by the norm of what they give.
        """
        for factor in self.factors:
            nn.init.normal_(factor)
        square = self._squared_norm([factor.float() for factor in self.factors])
        wanted = gain**2 * self.out_features / square
        for factor in self.factors:
            factor.mul_(wanted ** (0.5 / len(self.factors)))
        if self._bias is not None:
            nn.init.zeros_(self._bias)

    def _squared_norm(self, factors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Of the weight: the network times itself, or where this is more the weight written out."""
        sides = set(INPUTS + OUTPUTS)
        bonds = [[index for index in term if index not in sides] for term in self.terms]
        sizes = [math.prod(self.lengths[index] for index in own) for own in bonds]
        if sum(size**2 for size in sizes) > self.in_features * self.out_features or not all(bonds):
            return self.weight_of(*factors).square().sum()
        network: list[tuple[str, torch.Tensor]] = []
        for term, own, size, factor in zip(self.terms, bonds, sizes, factors, strict=True):
            name, twin = "".join(own), "".join(own).upper()
            if name == term:
                network += [(name, factor), (twin, factor)]
            else:
                order = [*map(term.index, own), *(n for n, i in enumerate(term) if i in sides)]
                rows = factor.permute(order).reshape(size, -1)
                lengths = [self.lengths[index] for index in own]
                network.append((name + twin, (rows @ rows.mT).reshape(lengths + lengths)))
        equation = ",".join(term for term, _ in network) + "->"
        lengths_of = {i: self.lengths[i.lower()] for i in equation if i.isalpha()}
        return plan_contraction(equation, lengths_of)(*(tensor for _, tensor in network))

    def extra_repr(self) -> str:
        modes = f"in_modes={self.in_modes}, out_modes={self.out_modes}"
        return f"{super().extra_repr()}, {modes}"


def ranks_within(rank: int | Sequence[int], limits: Sequence[int]) -> tuple[int, ...]:
    """One rank as far as each limit allows, or the ranks given; RankError for impossible ones."""
    if isinstance(rank, int):
        if rank < 1:
            raise RankError(f"rank {rank}: at least 1 is needed")
        return tuple(min(rank, limit) for limit in limits)
    if len(rank) != len(limits) or not all(
        1 <= one <= limit for one, limit in zip(rank, limits, strict=True)
    ):
        bounds = ", ".join(f"1..{limit}" for limit in limits)
        raise RankError(f"ranks {tuple(rank)} are outside ({bounds})")
    return tuple(rank)


def check_count(count: int, what: str) -> None:
    """RankError unless there is at least one of what is counted."""
    if count < 1:
        raise RankError(f"{count} {what}: at least 1 is needed")
