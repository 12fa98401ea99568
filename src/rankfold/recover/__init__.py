"""Bringing accuracy back after factorization, with labels or without."""

from rankfold.recover.batch_norm import reestimate_batch_norm
from rankfold.recover.blocks import recover_blocks
from rankfold.recover.objective import LossFunction, Penalty
from rankfold.recover.recover import recover
from rankfold.recover.state import Epoch, Recovery
from rankfold.recover.trainer import AfterStep, BeforeStep, Precision, Schedule

__all__ = [
    "AfterStep",
    "BeforeStep",
    "Epoch",
    "LossFunction",
    "Penalty",
    "Precision",
    "Recovery",
    "Schedule",
    "recover",
    "recover_blocks",
    "reestimate_batch_norm",
]
