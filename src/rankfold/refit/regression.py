"""Least squares of responses on features, of full or of reduced rank, through a ReLU or not."""

from dataclasses import dataclass
from functools import cached_property

import torch

from rankfold.decompose.matrix import leading_eigenvectors
from rankfold.methods.refit import of_equal_norms
from rankfold.refit.threshold import Threshold, stand_in

# Towards the map as it is: this share of the features' mean square.
_RIDGE = 1e-3
# Weights of the tie between response and its stand-in, one round each (Zhang et al.: 0.01 to 1).
_TIES = (0.01, 0.03, 0.1, 0.3, 1.0)


@dataclass(frozen=True)
class Map:
    """The responses are nearly `weight @ features + bias`."""

    weight: torch.Tensor  # (responses, features)
    bias: torch.Tensor | None  # (responses,)
    basis: torch.Tensor | None  # (responses, rank), orthonormal: of a map of reduced rank

    @property
    def biases(self) -> list[torch.Tensor]:
        return [] if self.bias is None else [self.bias]

    @property
    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(responses, rank) and (rank, features), of the same norm."""
        assert self.basis is not None
        left, right = of_equal_norms([self.basis, self.basis.mT @ self.weight])
        return left, right

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """(positions, responses), of (positions, features)."""
        found = features @ self.weight.mT
        return found if self.bias is None else found + self.bias


@dataclass(frozen=True)
class Regression:
    """Positions at which features and responses are known, and the map to start from.

    Solutions are tied a little to that map, so that features that are never seen keep it.
    """

    features: torch.Tensor  # (positions, features), float64
    responses: torch.Tensor  # (positions, responses), float64
    weight: torch.Tensor  # (responses, features), float64: the map as it is
    has_bias: bool

    def solve(self, relu: Threshold | None = None, rank: int | None = None) -> Map:
        """The best map, of reduced rank where one is given (Zhang et al. 2016, section 3.1.2).

        With `relu` what comes out of the ReLU is to be near (their section 3.2): the responses have
        stand-ins, free where the ReLU cuts off, and tied to what is predicted more and more.
        """
        found = self._linear(self.responses, rank)
        if relu is None:
            return found
        target = relu.of(self.responses)
        for tie in _TIES:
            predicted = relu.before(found(self.features))
            found = self._linear(relu.undo(stand_in(target, predicted, tie)), rank)
        return found

    def _linear(self, responses: torch.Tensor, rank: int | None) -> Map:
        middle = responses.mean(0) if self.has_bias else torch.zeros_like(responses[0])
        left = (responses - middle) - self._centred @ self.weight.mT
        crossed = left.mT @ self._centred / len(responses)
        gram, lower, failed = self._normal
        if failed:
            step = crossed @ torch.linalg.pinv(gram, hermitian=True)
        else:
            step = torch.cholesky_solve(crossed.mT, lower).mT
        weight, basis = self.weight + step, None
        if rank is not None:
            # The directions in which the map gives most.
            basis = leading_eigenvectors(weight @ gram @ weight.mT)[1][:, :rank]
            weight = basis @ (basis.mT @ weight)
        return Map(weight, middle - weight @ self._mean if self.has_bias else None, basis)

    @cached_property
    def _mean(self) -> torch.Tensor:
        return self.features.mean(0) if self.has_bias else torch.zeros_like(self.features[0])

    @cached_property
    def _centred(self) -> torch.Tensor:
        return self.features - self._mean

    @cached_property
    def _normal(self) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """The features' moment with a ridge, its Cholesky factor, and whether it has none."""
        gram = self._centred.mT @ self._centred / len(self.features)
        ridge = _RIDGE * gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
        gram = gram + ridge * torch.eye(len(gram)).to(gram)
        lower, failed = torch.linalg.cholesky_ex(gram)
        return gram, lower, bool(failed)
