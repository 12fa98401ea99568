"""The Tucker decomposition on all or on chosen modes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rankfold.decompose.matrix import (
    gram_eigenvectors,
    relative_error,
    shape,
    working_precision,
)
from rankfold.errors import RankError


@dataclass(frozen=True)
class Tucker:
    """A decomposition: tensor ≈ core x_m1 factors[0] x_m2 factors[1] ... over `modes`."""

    core: torch.Tensor  # as the tensor, but `ranks[k]` long in mode `modes[k]`
    factors: tuple[torch.Tensor, ...]  # each (length of the mode, rank), orthonormal columns
    modes: tuple[int, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(factor.shape[1] for factor in self.factors)

    @property
    def n_parameters(self) -> int:
        return self.core.numel() + sum(factor.numel() for factor in self.factors)

    def to_tensor(self) -> torch.Tensor:
        tensor = self.core
        for mode, factor in zip(self.modes, self.factors, strict=True):
            tensor = mode_product(tensor, factor, mode)
        return tensor

    def relative_error(self, tensor: torch.Tensor) -> float:
        """Frobenius norm of the difference, relative to that of `tensor` (0 for a zero tensor)."""
        return relative_error(self.to_tensor(), tensor)


def tucker(
    tensor: torch.Tensor,
    ranks: Sequence[int] | None = None,
    modes: Sequence[int] | None = None,
    sweeps: int = 3,
) -> Tucker:
    """Tucker decomposition: HOSVD, refined by higher-order orthogonal iteration.

    `tensor` has any order, float16 to float64 (half precision is computed in float32); `modes`
    defaults to all of them, `ranks` has one entry per mode and defaults to full. Without
    truncation, or with `sweeps=0`, this is the HOSVD, whose leading sub-blocks are the truncated
    HOSVDs of every smaller rank (De Lathauwer et al. 2000a, definition and property 10); `sweeps`
    rounds of HOOI (2000b) then lower the error of the chosen ranks. The factors come from mode
    Gram matrices in float64, never from the SVD of a wide unfolding. Raises RankError for ranks or
    modes that the tensor does not have, ValueError for NaN or infinity.
    """
    modes = tuple(range(tensor.dim())) if modes is None else tuple(modes)
    if len(set(modes)) != len(modes) or not all(0 <= mode < tensor.dim() for mode in modes):
        raise RankError(f"modes {modes} are not modes of a tensor of shape {shape(tensor)}")
    lengths = tuple(tensor.shape[mode] for mode in modes)
    ranks = lengths if ranks is None else tuple(ranks)
    if len(ranks) != len(modes) or not all(
        1 <= rank <= length for rank, length in zip(ranks, lengths, strict=False)
    ):
        raise RankError(
            f"ranks {ranks} do not fit modes {modes} of a tensor of shape {shape(tensor)}"
        )
    work = working_precision(tensor)
    double = work.double()
    factors = [leading_vectors(double, mode, rank) for mode, rank in zip(modes, ranks, strict=True)]
    if ranks != lengths and len(modes) > 1:
        for _ in range(sweeps):
            for position, mode in enumerate(modes):
                projected = project(double, modes, factors, skip=position)
                factors[position] = leading_vectors(projected, mode, ranks[position])
    core = project(double, modes, factors)
    return Tucker(
        core.to(work.dtype).contiguous(),
        tuple(factor.to(work.dtype).contiguous() for factor in factors),
        modes,
    )


def unfold(tensor: torch.Tensor, mode: int) -> torch.Tensor:
    """The mode-`mode` unfolding: (length of the mode, product of the others)."""
    return tensor.movedim(mode, 0).flatten(1)


def mode_product(tensor: torch.Tensor, matrix: torch.Tensor, mode: int) -> torch.Tensor:
    """Mode product, tensor x_mode matrix, for a matrix (new length, length of the mode)."""
    return torch.tensordot(matrix, tensor, dims=([1], [mode])).movedim(0, mode)


def leading_vectors(tensor: torch.Tensor, mode: int, rank: int) -> torch.Tensor:
    """The `rank` leading left singular vectors of an unfolding, as columns (length, rank)."""
    return gram_eigenvectors(unfold(tensor, mode))[1][:, :rank]


def project(
    tensor: torch.Tensor,
    modes: Sequence[int],
    factors: Sequence[torch.Tensor],
    skip: int | None = None,
) -> torch.Tensor:
    """The tensor multiplied by the transposed factor in every mode but the skipped one."""
    for position, (mode, factor) in enumerate(zip(modes, factors, strict=True)):
        if position != skip:
            tensor = mode_product(tensor, factor.mT, mode)
    return tensor
