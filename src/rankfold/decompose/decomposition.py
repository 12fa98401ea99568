"""What every decomposition has in common: what it answers, and the precision it is computed in."""

import math
from abc import ABC, abstractmethod

import torch

from rankfold.decompose.weights import Weights, Whitening
from rankfold.errors import TensorError

# Binary digits that the greatest magnitude may be away from 1 without harm to any square.
_NEAR_UNIT = 16


class Decomposition(ABC):
    """A tensor as a few factors."""

    @property
    @abstractmethod
    def ranks(self) -> tuple[int, ...]:
        """The rank or ranks, in the order of the modes."""

    @property
    @abstractmethod
    def n_parameters(self) -> int:
        """Numbers held by the factors."""

    @abstractmethod
    def to_tensor(self) -> torch.Tensor:
        """The factors multiplied out."""

    @property
    def batch_dims(self) -> int:
        """Leading dimensions of the tensor that count its members and are no modes."""
        return 0

    def relative_error(self, tensor: torch.Tensor, weights: Weights | None = None) -> float:
        """Norm of the difference relative to that of `tensor`, in float64 (0 for a zero tensor).

        The Frobenius norm, or with `weights`, one matrix for each weighted mode, the norm that they
        define (see `rankfold.decompose.weights`).
        """
        return relative_error(self.to_tensor(), tensor, weights, self.batch_dims)


def relative_error(
    approximation: torch.Tensor,
    tensor: torch.Tensor,
    weights: Weights | None = None,
    batch_dims: int = 0,
) -> float:
    """Norm of the difference over that of `tensor`, in float64 (0 if both are 0)."""
    whitening = Whitening.of(tensor.shape[batch_dims:], weights)
    exact = tensor.detach().double()
    difference = whitening.whiten(approximation.detach().double() - exact, batch_dims)
    norm = torch.linalg.vector_norm(whitening.whiten(exact, batch_dims)).item()
    distance = torch.linalg.vector_norm(difference).item()
    return distance / norm if norm > 0 else distance


def working_precision(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32 (from half precision) or as it is (float32, float64), and finite.

    Raises TensorError, a ValueError, for other dtypes, NaN and infinity, and for numbers so large
    that the dtype cannot hold their norm.
    """
    if tensor.dtype in (torch.float16, torch.bfloat16):
        tensor = tensor.float()
    if tensor.dtype not in (torch.float32, torch.float64):
        raise TensorError(f"decompositions take real floating-point tensors, not {tensor.dtype}")
    extremes = [abs(extreme.item()) for extreme in tensor.detach().aminmax()]
    if not all(map(math.isfinite, extremes)):
        raise TensorError(f"the tensor of shape {shape(tensor)} holds NaN or infinity")
    if max(extremes) * math.sqrt(tensor.numel()) > torch.finfo(tensor.dtype).max:
        raise TensorError(
            f"the tensor of shape {shape(tensor)} holds numbers up to {max(extremes):.3g}: "
            f"its norm is beyond {tensor.dtype}; scale it down"
        )
    return tensor


def shape(tensor: torch.Tensor) -> str:
    """A shape as people write it: 64x32x3x3."""
    return "x".join(map(str, tensor.shape)) or "scalar"


def to_unit_scale(tensor: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The tensor divided by the power of two at its greatest magnitude, and that power.

    Squares then neither overflow nor vanish, and the division is exact. A tensor near unit scale
    comes back as it is, with 1.
    """
    greatest = max(abs(extreme.item()) for extreme in tensor.aminmax())
    exponent = math.frexp(greatest)[1]
    if greatest == 0 or abs(exponent) <= _NEAR_UNIT:
        return tensor, 1.0
    scale = 2.0**exponent
    if math.isinf(scale):
        scale /= 2
    return tensor / scale, scale
