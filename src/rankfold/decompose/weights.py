"""The metric in which a decomposition is best: a symmetric positive semidefinite weight per mode.

With weights A_m the error of an approximation with difference D is the norm of D multiplied by
A_m^½ in every weighted mode m. All decompositions here stay what they are under products with a
matrix in a mode, so the best one in the metric is the best one of the whitened tensor, its factors
multiplied by A_m^-½. Directions that a singular weight ignores are given next to none: they are
followed as well as the factors chosen for the others allow, and at full rank exactly. The least
eigenvalue, relative to the greatest, is 1e-12 for one weighted mode; for k of them 1e-16 to the
power 1 / k, because their roots multiply and float64 has to see what is left.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from rankfold.decompose.symmetric import symmetric_roots
from rankfold.decompose.unfolding import mode_product

Weights = Mapping[int, torch.Tensor]  # mode to weight, (length of the mode, the same)

_LEAST = 1e-12
_LEAST_PRODUCT = 1e-16


@dataclass(frozen=True)
class Whitening:
    """Square roots of the weights, by mode; without any, nothing is changed."""

    roots: dict[int, torch.Tensor]
    inverse_roots: dict[int, torch.Tensor]

    @staticmethod
    def of(lengths: Sequence[int], weights: Weights | None) -> "Whitening":
        """Of weights that fit a tensor with modes of these lengths; ValueError if they do not."""
        roots, inverse_roots = {}, {}
        weights = weights or {}
        floor = max(_LEAST, _LEAST_PRODUCT ** (1 / max(1, len(weights))))
        for mode, weight in weights.items():
            if not 0 <= mode < len(lengths):
                raise ValueError(f"a weight for mode {mode} of a tensor with {len(lengths)} modes")
            if weight.shape != (lengths[mode], lengths[mode]):
                raise ValueError(
                    f"the weight of mode {mode}, {lengths[mode]} long, has the shape "
                    f"{tuple(weight.shape)}"
                )
            try:
                found = symmetric_roots(weight, floor)
            except ValueError as error:
                raise ValueError(f"the weight of mode {mode}: {error}") from error
            roots[mode], inverse_roots[mode] = found.root, found.inverse_root
        return Whitening(roots, inverse_roots)

    def whiten(self, tensor: torch.Tensor, batch_dims: int = 0) -> torch.Tensor:
        """The tensor multiplied by the root in every weighted mode, float64 if there is one.

        The modes are counted after `batch_dims` leading dimensions.
        """
        for mode, root in self.roots.items():
            tensor = mode_product(tensor.double(), root, mode + batch_dims)
        return tensor

    def restore(self, factor: torch.Tensor, mode: int) -> torch.Tensor:
        """A factor (length of the mode, rank) of the whitened tensor as one of the tensor."""
        return self.inverse_roots[mode] @ factor if mode in self.roots else factor
