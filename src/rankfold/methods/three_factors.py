"""Kernels that are linear in three factors each, outputs, cores and inputs, found in turn."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Self, TypeVar

import torch

from rankfold.methods.moments import WEIGHT_METRIC
from rankfold.methods.refit import best_last_factor

_IMPROVEMENT = 1e-3  # share of the squared error: less ends the sweeps
_CORE_STEPS = 4


@dataclass(frozen=True)
class ThreeFactors(ABC):
    """Σ outputs[:, n] cores inputs[:, m]ᵀ, of a kernel (out, in, places)."""

    outputs: torch.Tensor  # (out, number of maps, width of outputs)
    inputs: torch.Tensor  # (in, number of maps, width of inputs)
    cores: torch.Tensor  # (..., width of outputs, width of inputs, places)

    @abstractmethod
    def features(self) -> torch.Tensor:
        """The kernel of all but the last factor: (number * width of outputs, in, places)."""

    @abstractmethod
    def projected(self, tensor: torch.Tensor) -> torch.Tensor:
        """The inner products of a kernel with what each entry of the cores stands for."""

    @abstractmethod
    def with_outputs(self, outputs: torch.Tensor) -> Self:
        """With others, orthonormal as far as the cores can make up for it."""

    def to_tensor(self) -> torch.Tensor:
        return torch.tensordot(self.outputs.flatten(1), self.features(), dims=1)

    def transposed(self) -> Self:
        return replace(
            self,
            outputs=self.inputs,
            inputs=self.outputs,
            cores=self.cores.transpose(-3, -2),
        )

    def with_best_outputs(self, tensor: torch.Tensor) -> Self:
        """By least squares."""
        solved = best_last_factor(tensor, self.features(), WEIGHT_METRIC)
        return self.with_outputs(solved.reshape(self.outputs.shape))

    def with_better_cores(self, tensor: torch.Tensor) -> Self:
        """A few steps of conjugate gradients for all cores together."""
        cores = self.cores
        rest = self.projected(tensor - self.to_tensor())
        direction, size = rest, rest.square().sum()
        for _ in range(_CORE_STEPS):
            effect = replace(self, cores=direction).to_tensor()
            curvature = effect.square().sum()
            if not curvature > 0:
                break
            along = size / curvature
            cores = cores + along * direction
            rest = rest - along * self.projected(effect)
            size, previous = rest.square().sum(), size
            direction = rest + (size / previous) * direction
        return replace(self, cores=cores)


Found = TypeVar("Found", bound=ThreeFactors)


def in_turn(tensor: torch.Tensor, factors: Found, sweeps: int) -> Found:
    """Solve for the outputs, for the inputs, and improve the cores, while that lowers the error."""
    total = tensor.square().sum().item()
    error = (tensor - factors.to_tensor()).square().sum().item()
    for _ in range(sweeps):
        if error <= 1e-20 * total:
            break
        found = factors.with_best_outputs(tensor)
        found = found.transposed().with_best_outputs(tensor.transpose(0, 1)).transposed()
        found = found.with_better_cores(tensor)
        before, error = error, (tensor - found.to_tensor()).square().sum().item()
        if not error < before:
            break
        factors = found
        if before - error < _IMPROVEMENT * before:
            break
    return factors
