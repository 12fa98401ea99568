"""The tensor that a CP decomposition is fitted to, and its products with the factors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from rankfold.decompose.cp.form import khatri_rao, multiply_out
from rankfold.decompose.unfolding import halves


@dataclass(frozen=True)
class Target:
    """A float64 tensor of order two or more.

    The product that all algorithms live on, the MTTKRP (matricized tensor times Khatri-Rao
    product), contracts all modes but one with the factors. Those of half of the modes share one
    matrix product, those of the others another (the dimension tree of Phan, Tichavsky, Cichocki
    2013): two passes over the tensor for all modes instead of one for each.
    """

    tensor: torch.Tensor

    @property
    def order(self) -> int:
        return self.tensor.dim()

    @property
    def squared_norm(self) -> float:
        return self.tensor.square().sum().item()

    def mttkrp(self, factors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """All of them, for these factors: each (length of the mode, rank)."""
        products: dict[int, torch.Tensor] = {}
        self.sweep(list(factors), products.__setitem__)
        return [products[mode] for mode in range(self.order)]

    def sweep(
        self, factors: list[torch.Tensor], visit: Callable[[int, torch.Tensor], None]
    ) -> None:
        """Call `visit` with each mode, the last one last, and its MTTKRP in turn.

        It may replace `factors[mode]`: the products of later modes are then those of the new one.
        """
        lengths = self.tensor.shape
        first, last = halves(tuple(lengths))
        matrix = self._matrix
        for group, others, view in ((first, last, matrix), (last, first, matrix.mT)):
            shared = view @ khatri_rao([factors[mode] for mode in others])
            shared = shared.reshape(*(lengths[mode] for mode in group), -1)
            for mode in group:
                visit(mode, _contract_all_but(mode, group, shared, factors))

    @cached_property
    def _matrix(self) -> torch.Tensor:
        """The tensor, the first half of its modes in rows and the others in columns."""
        first, last = halves(tuple(self.tensor.shape))
        rows = lengths_product([self.tensor.shape[mode] for mode in first])
        return self.tensor.permute(first + last).reshape(rows, -1)

    def residual(self, factors: list[torch.Tensor]) -> "Target":
        """What the factors overshoot: their tensor minus this one."""
        return Target(multiply_out(factors) - self.tensor)


def lengths_product(lengths: Sequence[int]) -> int:
    return torch.Size(lengths).numel()


def _contract_all_but(
    mode: int, group: Sequence[int], shared: torch.Tensor, factors: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Contract a tensor (lengths of the group's modes..., rank) with the factors of the others."""
    # From the back, so that the axes before stay where they are.
    for axis in reversed(range(len(group))):
        if group[axis] != mode:
            sizes = [1] * (shared.dim() - 1) + [shared.shape[-1]]
            sizes[axis] = shared.shape[axis]
            shared = (shared * factors[group[axis]].reshape(sizes)).sum(axis)
    return shared


def gramian(factor: torch.Tensor) -> torch.Tensor:
    return factor.mT @ factor


def product_of_others(grams: Sequence[torch.Tensor], *modes: int) -> torch.Tensor:
    """The elementwise product of the Gramians of all modes but these, (rank, rank)."""
    product = torch.ones_like(grams[0])
    for mode, gram in enumerate(grams):
        if mode not in modes:
            product = product * gram
    return product
