"""Sums of products of rows: float32 products added up in float64."""

import torch

_ROWS = 4096  # of one float32 product


def add_gram(total: torch.Tensor | None, rows: torch.Tensor, share: float) -> torch.Tensor:
    """The total, float64, plus `share` times rowsᵀ rows, (..., positions, entries).

    Scaled so that no square under- or overflows.
    """
    if total is None:
        *stacked, _, size = rows.shape
        total = torch.zeros(*stacked, size, size, dtype=torch.float64, device=rows.device)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    greatest = rows.abs().max().item() if rows.numel() else 0.0
    if greatest == 0:
        return total
    with torch.autocast(rows.device.type, enabled=False):  # the model may have it on
        for part in (rows / greatest).split(_ROWS, dim=-2):
            total.add_(part.mT @ part, alpha=share * greatest**2)
    return total
