"""Kernels that are linear in three factors each, outputs, cores and inputs, found in turn."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Generic, Self, TypeVar

import torch

from rankfold.decompose import tucker
from rankfold.methods.refit import solve

_IMPROVEMENT = 1e-3  # share of the squared error: less ends the sweeps
_CORE_STEPS = 4
# Sweeps on the whole kernel before, and after, those on what of it is not small beside the error:
# whose square is more than this share.
_FIRST, _LAST, _SMALL = 6, 3, 0.05
# Share of the total below which an error that is a difference of larger numbers says little.
_ROUNDING = 1e-7


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
    def onto_inputs(self, half: torch.Tensor) -> torch.Tensor:
        """`half` contracted with the cores, in the shape of the inputs."""

    @abstractmethod
    def onto_cores(self, half: torch.Tensor) -> torch.Tensor:
        """`half` contracted with the inputs: what each entry of the cores has in common with it."""

    @abstractmethod
    def with_outputs(self, outputs: torch.Tensor) -> Self:
        """With others, orthonormal as far as the cores can make up for it."""

    def gram(self) -> torch.Tensor:
        """The inner products of the features: (number * width of outputs) squared."""
        flat = self.features().flatten(1)
        return flat @ flat.mT

    def normal(self, cores: torch.Tensor) -> torch.Tensor:
        """What such cores, with these outputs and inputs, have in common with their entries."""
        return self.onto_cores(self.half(replace(self, cores=cores).to_tensor()))

    def to_tensor(self) -> torch.Tensor:
        return torch.tensordot(self.outputs.flatten(1), self.features(), dims=1)

    def half(self, tensor: torch.Tensor) -> torch.Tensor:
        """A kernel contracted with the outputs: (number of maps, width of outputs, in, places)."""
        contracted = torch.tensordot(self.outputs.flatten(1).mT, tensor, dims=1)
        return contracted.unflatten(0, self.outputs.shape[1:])

    def transposed(self) -> Self:
        return replace(
            self,
            outputs=self.inputs,
            inputs=self.outputs,
            cores=self.cores.transpose(-3, -2),
        )

    def turned(self, outputs: torch.Tensor, inputs: torch.Tensor) -> Self:
        """Of the kernel whose channels are multiplied by matrices (new, old)."""
        return replace(
            self,
            outputs=torch.tensordot(outputs, self.outputs, dims=1),
            inputs=torch.tensordot(inputs, self.inputs, dims=1),
        )

    def with_best_outputs(self, tensor: torch.Tensor) -> Self:
        """By least squares."""
        other = self.transposed()
        return other.with_best_inputs(other.half(tensor.transpose(0, 1))).transposed()

    def with_best_inputs(self, half: torch.Tensor) -> Self:
        """By least squares, for the `half` of a kernel."""
        other = self.transposed()
        gram = other.gram()
        solved = solve((gram + gram.mT) / 2, self.onto_inputs(half).flatten(1))
        return other.with_outputs(solved.reshape(self.inputs.shape)).transposed()

    def with_better_cores(self, half: torch.Tensor) -> tuple[Self, float]:
        """After a few steps of conjugate gradients for all cores together; what the error gained.

        The gain is the squared norm of the kernel less the squared error.
        """
        cores, wanted = self.cores, self.onto_cores(half)
        rest = wanted - self.normal(cores)
        direction, size = rest, rest.square().sum()
        for _ in range(_CORE_STEPS):
            image = self.normal(direction)
            curvature = (direction * image).sum()
            if not curvature > 0:
                break
            along = size / curvature
            cores = cores + along * direction
            rest = rest - along * image
            size, previous = rest.square().sum(), size
            direction = rest + (size / previous) * direction
        return replace(self, cores=cores), (cores * (wanted + rest)).sum().item()


Found = TypeVar("Found", bound=ThreeFactors)


def in_turn(tensor: torch.Tensor, factors: Found, sweeps: int) -> Found:
    """Solve for the outputs, for the inputs, and improve the cores, while that lowers the error.

    After a few sweeps on the kernel (out, in, places) what of its channels is small beside the
    error is left out, where that is much, and seen again by the last ones.
    """
    if sweeps <= _FIRST + _LAST:
        return _swept(tensor, factors, sweeps).factors
    known = _swept(tensor, factors, _FIRST)
    if known.ended:
        return known.factors
    allowed = (_SMALL * known.error / tensor.square().sum().item()) ** 0.5
    small = tucker(tensor, modes=(0, 1), tolerance=allowed, sweeps=0)
    if 2 * small.core.numel() > tensor.numel():
        return _swept(tensor, known.factors, sweeps - _FIRST).factors
    outputs, inputs = small.factors
    found = known.factors.turned(outputs.mT, inputs.mT)
    found = _swept(small.core, found, sweeps - _FIRST - _LAST).factors
    finished = _swept(tensor, found.turned(outputs, inputs), _LAST)
    return finished.factors if finished.error < known.error else known.factors


@dataclass(frozen=True)
class _Swept(Generic[Found]):
    factors: Found
    error: float  # squared
    ended: bool  # for no more is to be gained


def _swept(tensor: torch.Tensor, factors: Found, sweeps: int) -> _Swept[Found]:
    total = tensor.square().sum().item()
    error = (tensor - factors.to_tensor()).square().sum().item()
    for _ in range(sweeps):
        if error <= 1e-20 * total:
            return _Swept(factors, error, ended=True)
        found = factors.with_best_outputs(tensor)
        half = found.half(tensor)
        found, gained = found.with_best_inputs(half).with_better_cores(half)
        before, reached = error, total - gained
        if reached < _ROUNDING * total:
            reached = (tensor - found.to_tensor()).square().sum().item()
        if not reached < before:
            return _Swept(factors, error, ended=True)
        factors, error = found, reached
        if before - error < _IMPROVEMENT * before:
            return _Swept(factors, error, ended=True)
    return _Swept(factors, error, ended=False)
