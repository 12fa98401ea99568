"""Every error that rankfold raises on purpose.

RankfoldError
├── ModelError              a model that cannot be imported, built or run, or holds NaN
├── UnsupportedLayerError   a layer asked for by name that no method can factorize
├── RankError               a rank that the layer or tensor cannot have
├── TensorError             a tensor that no decomposition takes: NaN, infinity, integers
├── CalibrationError        data that yields nothing, or a batch that gives NaN
├── BudgetError             a budget that cannot be reached; `.smallest` can
├── PlanError               a plan that does not fit the model, or is not a plan
├── CheckpointError         a saved model that is missing, damaged or foreign
└── DeviceError             a device that this machine does not have
"""


class RankfoldError(Exception):
    """Root of all errors that rankfold raises on purpose."""

    def __str__(self) -> str:
        return "; ".join([super().__str__(), *getattr(self, "__notes__", [])])


class ModelError(RankfoldError):
    """A model that cannot be imported, built or run, or whose weights are not finite."""


class UnsupportedLayerError(RankfoldError):
    """A layer that was asked for by name and that no method can factorize."""


class RankError(RankfoldError, ValueError):
    """A rank that the layer or tensor at hand cannot have."""


class TensorError(RankfoldError, ValueError):
    """A tensor that no decomposition takes: it holds NaN or infinity, or no real numbers."""


class CalibrationError(RankfoldError):
    """Data that yields nothing or cannot be read, or a batch on which the network is not finite."""


class BudgetError(RankfoldError, ValueError):
    """A budget that cannot be reached. `smallest` holds the least that can, by cost name."""

    def __init__(self, message: str, smallest: dict[str, float] | None = None) -> None:
        super().__init__(message)
        self.smallest = smallest or {}


class PlanError(RankfoldError):
    """A plan that does not fit the model it is applied to, or is malformed."""


class CheckpointError(RankfoldError):
    """A saved model or training state that is missing, damaged, mismatched or foreign."""


class DeviceError(RankfoldError):
    """A device that was asked for and is not there."""
