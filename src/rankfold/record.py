"""What a factorized network remembers of its making."""

from dataclasses import dataclass

from torch import nn

from rankfold.analysis import Analysis
from rankfold.errors import PlanError
from rankfold.measure import Comparison
from rankfold.merging import Pair
from rankfold.narrowing import Removal
from rankfold.outlook import Outlook
from rankfold.plan import Plan
from rankfold.recover import Recovery

_ATTRIBUTE = "_rankfold_record"


@dataclass(frozen=True)
class Record:
    """How a network was made, and how it was found to do."""

    plan: Plan
    source_sha256: str  # of the weights that were factorized
    recovery: Recovery | None = None
    comparison: Comparison | None = None
    outlook: Outlook | None = None  # the plans that could have been made
    elastic: Analysis | None = None  # the ranks that it can be sliced to (rankfold.elastic)
    merged: tuple[Pair, ...] = ()  # modules that are one, by name, in turn (rankfold.deployment)
    removed: tuple[Removal, ...] = ()  # what was taken out, in turn (rankfold.sparsity)


def attach_record(model: nn.Module, record: Record) -> None:
    """Make a network remember; its copies remember too."""
    model.__dict__[_ATTRIBUTE] = record


def record_of(model: nn.Module) -> Record:
    """How a network was made; raises PlanError for one that rankfold did not make."""
    record = model.__dict__.get(_ATTRIBUTE)
    if not isinstance(record, Record):
        raise PlanError("this model was not made by rankfold.factorize or rankfold.load")
    return record
