"""The rank that keeps a share of the energy (the squared singular values)."""

import torch


def energy_rank(singular_values: torch.Tensor, kept: float) -> int:
    """The least rank whose leading singular values hold the fraction `kept` of the energy.

    `singular_values` is (n,), descending; `kept` lies in (0, 1]. A spectrum of zeros has rank 1.
    Raises ValueError for `kept` outside (0, 1].
    """
    if not 0 < kept <= 1:
        raise ValueError(f"energy kept must lie in (0, 1], not {kept}")
    energy = singular_values.double().square()
    total = energy.sum()
    if total == 0:
        return 1
    missing = energy.flip(0).cumsum(0).flip(0)  # missing[r]: energy lost at rank r
    lost = torch.cat([missing, missing.new_zeros(1)]) / total
    # Rounding of the sums must not ask for a rank that adds nothing.
    enough = lost <= (1 - kept) + 1e-15
    return max(1, int(enough.int().argmax()))
