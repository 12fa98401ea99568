"""The metric that a layer is approximated in: what an error of its weight costs the network.

For a layer y = W x the loss rises, to second order, by about

    ½ T tr(G Δ A Δᵀ)

when W becomes W + Δ: A = E[x xᵀ] over the positions of the inputs, G = E[g gᵀ] over those of the
gradients of the loss with respect to y, T positions in a sample (the Kronecker-factored Fisher
matrix: Martens and Grosse 2015; for convolutions Grosse and Martens 2016).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch

from rankfold.decompose import symmetric_roots
from rankfold.decompose.symmetric import checked_symmetric
from rankfold.errors import TensorError

# Least over greatest eigenvalue of a moment whose inverse root is taken.
_FLOOR = 1e-10


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments that weigh the error of a weight (out, in, *kernel); None: the identity.

    `Moments()` is the plain weight metric. The inputs' moment is that of whole patches, or of the
    channels alone, the same at every place of the kernel. A moment of one dimension is a diagonal:
    of an embedding the frequencies of the tokens; of very many outputs. All float64. Those of a
    grouped convolution are stacks, (groups, n, n), and of a transposed one the channels' (see
    `rankfold.methods.reduction`, which makes them moments of plain convolutions); of a recurrent
    layer both are those of the states, (layers * directions, hidden, hidden).
    """

    inputs: torch.Tensor | None = None  # A: (in * kernel size,) squared, or (in, in)
    gradients: torch.Tensor | None = None  # G: (out, out)
    scale: float | None = None
    """Loss per unit of tr(G Δ A Δᵀ); None: relative to that of the whole weight."""
    given: "Moments | None" = None
    """Of a recurrent layer, whose other moments are those of its states: those of its inputs."""

    def check_finite(self) -> None:
        """Raise TensorError if there is NaN or infinity in it."""
        known = (self.inputs, self.gradients)
        if not all(one is None or bool(one.isfinite().all()) for one in known):
            raise TensorError("the moments of the inputs or gradients hold NaN or infinity")
        if self.given is not None:
            self.given.check_finite()

    def to(self, device: torch.device) -> "Moments":
        """The same on a device."""
        inputs, gradients = self.inputs, self.gradients
        return Moments(
            None if inputs is None else inputs.to(device),
            None if gradients is None else gradients.to(device),
            self.scale,
            None if self.given is None else self.given.to(device),
        )

    def damped(self, share: float) -> "Moments":
        """With this share of its mean eigenvalue added to the inputs' moment."""
        if self.inputs is None:
            return self
        if self.inputs.dim() == 1:
            return Moments(self.inputs + share * self.inputs.mean(), self.gradients, self.scale)
        identity = torch.eye(len(self.inputs)).to(self.inputs)
        added = share * self.inputs.diagonal().mean() * identity
        return Moments(self.inputs + added, self.gradients, self.scale)

    def without_diagonals(self) -> "Moments":
        """The same with the mean in the place of a diagonal, for a method that knows matrices."""
        known: list[torch.Tensor | None] = []
        scale = self.scale
        for moment in (self.inputs, self.gradients):
            is_diagonal = moment is not None and moment.dim() == 1
            known.append(None if is_diagonal else moment)
            if is_diagonal and scale is not None:
                scale *= cast(torch.Tensor, moment).mean().item()
        return Moments(known[0], known[1], scale)

    @property
    def is_plain(self) -> bool:
        """Whether all errors count the same."""
        return self.inputs is None and self.gradients is None

    def times_inputs(self, weight: torch.Tensor) -> torch.Tensor:
        """W A for rows of the weight's shape (..., in, *kernel), unfolded to (..., in * kernel)."""
        flat = weight.double().flatten(1)
        if self.inputs is None:
            return flat
        if self.inputs.dim() == 1:
            return flat * self.inputs
        if len(self.inputs) == flat.shape[1]:
            return flat @ self.inputs
        return torch.einsum("oi...,ij->oj...", weight.double(), self.inputs).flatten(1)

    def times_gradients(self, weight: torch.Tensor) -> torch.Tensor:
        """G W, unfolded to (out, in * kernel)."""
        flat = weight.double().flatten(1)
        if self.gradients is None:
            return flat
        return (
            self.gradients[:, None] * flat if self.gradients.dim() == 1 else self.gradients @ flat
        )

    def squared_error(self, difference: torch.Tensor) -> float:
        """tr(G Δ A Δᵀ) of a difference of two weights (out, in, *kernel)."""
        return (self.times_gradients(difference) * self.times_inputs(difference)).sum().item()

    def loss_of(self, squared_error: torch.Tensor | float, weight: torch.Tensor) -> torch.Tensor:
        """The loss of a squared error in this metric, (...), float64 on the CPU, never negative.

        Raises TensorError for errors that are not finite, as where a product of factors overflows.
        """
        scale = self.scale
        if scale is None:
            whole = self.squared_error(weight)
            scale = 1 / whole if whole > 0 else 0.0
        errors = torch.as_tensor(squared_error, dtype=torch.float64)
        if not errors.isfinite().all():
            raise TensorError(
                f"numbers beyond what {weight.dtype} can hold: scale the layer's weight down, or "
                "factorize it in a wider dtype"
            )
        return (scale * errors).clamp_min(0).cpu()

    @cached_property
    def output_roots(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """G^½ and G^-½."""
        return _roots(self.gradients)

    @cached_property
    def input_roots(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A^½ and A^-½."""
        return _roots(self.inputs)

    @cached_property
    def input_factor(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """R and R⁻¹ with A = R Rᵀ: Cholesky's, or A^½, more work, where A is near singular."""
        if self.inputs is None or self.inputs.dim() == 1:
            return self.input_roots
        lower, failed = torch.linalg.cholesky_ex(checked_symmetric(self.inputs))
        pivots = lower.diagonal()
        if failed or not (pivots.min() > _FLOOR**0.5 * pivots.max()):
            return self.input_roots
        identity = torch.eye(len(lower)).to(lower)
        return lower, torch.linalg.solve_triangular(lower, identity, upper=False)

    def of_channels(self, channels: int) -> "Moments":
        """The same with the moment of the input channels alone: the mean over a kernel's places."""
        if self.inputs is None or len(self.inputs) == channels:
            return self
        places = len(self.inputs) // channels
        split = self.inputs.reshape(channels, places, channels, places)
        mean = split.diagonal(dim1=1, dim2=3).mean(-1)
        return Moments(mean, self.gradients, self.scale)


def losses_by_rank(squares: torch.Tensor, scale: float | None) -> torch.Tensor:
    """The loss of each rank from 0 on, (n + 1,), float64: what is left of n squares after the rank.

    `scale` is the loss of a unit; None: relative to all of them.
    """
    beyond = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
    whole = beyond[0].item()
    if scale is None:
        scale = 1 / whole if whole > 0 else 0.0
    return (scale * beyond).cpu()


def _roots(moment: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor] | None:
    if moment is None:
        return None
    found = symmetric_roots(moment.diag() if moment.dim() == 1 else moment, _FLOOR)
    return found.root, found.inverse_root


WEIGHT_METRIC = Moments()
