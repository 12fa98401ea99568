"""How an error tolerance is shared out over the truncations of one decomposition."""

from dataclasses import dataclass

import torch


@dataclass
class Budget:
    """The squared error that each member of a batch has left to spend, (members,), float64.

    None if ranks and not a tolerance decide.
    """

    left: torch.Tensor | None

    @staticmethod
    def of(tensor: torch.Tensor, tolerance: float | None, batch_dims: int = 0) -> "Budget":
        """For an error of `tolerance` relative to each member's Frobenius norm.

        Raises ValueError for a tolerance outside [0, 1).
        """
        if tolerance is None:
            return Budget(None)
        if not 0 <= tolerance < 1:
            raise ValueError(f"tolerance must lie in [0, 1), not {tolerance}")
        return Budget(tolerance**2 * energies(tensor, batch_dims))

    def truncate(self, squares: torch.Tensor, limit: int, truncations_left: float = 1) -> int:
        """The rank of a truncation that may lose its share; what it loses is taken off.

        `squares` are squared singular values (..., n), descending, one spectrum for each member.
        Without a tolerance this is `limit`.
        """
        if self.left is None:
            return limit
        spectra = squares.double().reshape(len(self.left), -1)
        beyond = spectra.flip(-1).cumsum(-1).flip(-1)
        lost = torch.cat([beyond, torch.zeros_like(beyond[:, :1])], dim=1)
        # Rounding of the sums must not ask for a rank that adds nothing.
        rounding = torch.where(self.left > 0, 1e-15 * lost[:, 0], 0)
        within = lost <= (self.left / truncations_left + rounding)[:, None]
        rank = max(1, int(within.all(0).int().argmax()))
        self.pay(lost[:, rank])
        return rank

    def is_coarse(self, tensor: torch.Tensor) -> bool:
        """Whether an error within the budget is well above what squares in float64 resolve."""
        if self.left is None:
            return False
        return bool((self.left > 1e-12 * energies(tensor).sum()).all())

    def pay(self, cost: torch.Tensor) -> None:
        """Take off what each member has spent; a little more, by rounding, leaves nothing."""
        assert self.left is not None
        self.left = (self.left - cost).clamp_min(0)


def energies(tensor: torch.Tensor, batch_dims: int = 0) -> torch.Tensor:
    """The squared Frobenius norm of each member of a batch, (members,), float64."""
    return tensor.double().reshape(tensor.shape[:batch_dims].numel(), -1).square().sum(1)
