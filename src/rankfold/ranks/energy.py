"""The rank that keeps a share of the energy, the squared singular values, or loses little."""

import torch


def energy_rank(singular_values: torch.Tensor, kept: float) -> int:
    """The least rank whose leading singular values hold the fraction `kept` of the energy.

    `singular_values` is (n,), descending; `kept` lies in (0, 1]. A spectrum of zeros has rank 1.
    Raises ValueError for `kept` outside (0, 1].
    """
    if not 0 < kept <= 1:
        raise ValueError(f"energy kept must lie in (0, 1], not {kept}")
    return _least_rank(singular_values, 1 - kept)


def tolerance_rank(singular_values: torch.Tensor, tolerance: float) -> int:
    """The least rank whose relative error in the Frobenius norm is at most `tolerance`.

    `singular_values` is (n,), descending; `tolerance` lies in [0, 1). A spectrum of zeros has rank
    1. Raises ValueError for `tolerance` outside [0, 1).
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must lie in [0, 1), not {tolerance}")
    return _least_rank(singular_values, tolerance**2)


def _least_rank(singular_values: torch.Tensor, lost: float) -> int:
    """The least rank from 1 on that loses at most this fraction of the energy."""
    energy = singular_values.double().square()
    beyond = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])
    # Rounding of the sums must not ask for a rank that adds nothing.
    enough = beyond <= (lost + 1e-15) * beyond[0] if lost else beyond == 0
    return max(1, int(enough.int().argmax()))
