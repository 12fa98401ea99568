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
│   └── JournalError        a journal of other work, or one that another process holds
└── DeviceError             a device that this machine does not have, or whose memory is too small
"""

import re

# Control characters but tab and line feed, what turns the direction of text, and halves of
# surrogate pairs: a terminal obeys some of them, and others cannot be written.
UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)

_LONGEST = 1000  # characters of a message


class RankfoldError(Exception):
    """Root of all errors that rankfold raises on purpose."""

    def __str__(self) -> str:
        """In printable characters and of some length at most: names may be from anywhere."""
        text = "; ".join([super().__str__(), *getattr(self, "__notes__", [])])
        if len(text) > _LONGEST:
            text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 4 :]}"
        return UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


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


class JournalError(CheckpointError):
    """A journal of other work than what was asked for, or one that another process holds."""


class DeviceError(RankfoldError):
    """A device that was asked for and is not there, or whose memory does not suffice."""
