"""Factors fitted again to what the original did, on the inputs that they really get."""

from rankfold.refit.refit import Refit, Refitted, refit

__all__ = ["Refit", "Refitted", "refit"]
