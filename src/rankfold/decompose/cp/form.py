"""The canonical polyadic form: a sum of rank-one terms."""

from dataclasses import dataclass

import torch

from rankfold.decompose.decomposition import Decomposition
from rankfold.decompose.unfolding import halves
from rankfold.errors import RankError


@dataclass(frozen=True)
class CP(Decomposition):
    """`tensor ≈ Σ_r norms[r] factors[0][:, r] ∘ factors[1][:, r] ∘ ...`, heaviest terms first."""

    norms: torch.Tensor  # (rank,), the Frobenius norms of the terms
    factors: tuple[torch.Tensor, ...]  # each (length of the mode, rank), columns of norm one

    @property
    def ranks(self) -> tuple[int]:
        return (self.norms.numel(),)

    @property
    def n_parameters(self) -> int:
        """Numbers held by the factors, the norms absorbed into one of them."""
        return sum(factor.numel() for factor in self.factors)

    @property
    def sensitivity(self) -> float:
        """The sum of the squared norms of the terms (Phan et al. 2020).

        Far above the squared norm of the tensor, the terms cancel each other: a small change of one
        factor is a large one of the tensor, and fine-tuning fails.
        """
        return self.norms.double().square().sum().item()

    def truncate(self, rank: int) -> "CP":
        """The `rank` heaviest terms; raises RankError outside 1..ranks[0]."""
        if not 1 <= rank <= self.ranks[0]:
            raise RankError(f"rank {rank} is outside 1..{self.ranks[0]}")
        return CP(self.norms[:rank], tuple(factor[:, :rank] for factor in self.factors))

    def balanced(self) -> tuple[torch.Tensor, ...]:
        """Factors (length, rank) whose columns share out the norms of the terms evenly.

        Equal norms keep the gradients of all factors alike when they are trained.
        """
        root = self.norms ** (1 / len(self.factors))
        return tuple(factor * root for factor in self.factors)

    def to_tensor(self) -> torch.Tensor:
        return multiply_out([self.factors[0] * self.norms, *self.factors[1:]])


def from_factors(factors: list[torch.Tensor]) -> CP:
    """The normalised form of factors (length of the mode, rank) of any scale."""
    norms = [torch.linalg.vector_norm(factor, dim=0) for factor in factors]
    total = torch.stack(norms).prod(0)
    order = total.argsort(descending=True, stable=True)
    unit = [
        (factor / torch.where(norm > 0, norm, 1))[:, order]
        for factor, norm in zip(factors, norms, strict=True)
    ]
    return CP(total[order], tuple(factor.contiguous() for factor in unit))


def multiply_out(factors: list[torch.Tensor]) -> torch.Tensor:
    """The tensor that the factors stand for, as one matrix product."""
    first, last = halves(tuple(factor.shape[0] for factor in factors))
    rows, columns = (khatri_rao([factors[mode] for mode in group]) for group in (first, last))
    product = (rows @ columns.mT).reshape([factors[mode].shape[0] for mode in first + last])
    return product.movedim(tuple(range(len(factors))), first + last)


def khatri_rao(factors: list[torch.Tensor]) -> torch.Tensor:
    """Column-wise Kronecker product, the first mode slowest: (product of lengths, rank)."""
    product = factors[0]
    for factor in factors[1:]:
        product = (product[:, None, :] * factor[None, :, :]).flatten(0, 1)
    return product
