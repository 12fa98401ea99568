"""The canonical polyadic decomposition: its form, where it starts, how it is found."""

from rankfold.decompose.cp.decompose import cp, error_preserving_correction
from rankfold.decompose.cp.form import CP, from_factors, khatri_rao

__all__ = ["CP", "cp", "error_preserving_correction", "from_factors", "khatri_rao"]
