"""Smaller and measurably faster PyTorch networks by low-rank and tensor factorization.

    analysis = rankfold.analyze(model, data)
    plan     = analysis.plan(macs=0.3)
    small    = rankfold.factorize(model, plan)
    rankfold.recover(small, data, teacher=model)
    print(rankfold.measure(model, small, data))
    rankfold.save(small, "small/")

or `small = rankfold.compress(model, data, macs=0.3)` for all but the saving.
"""

from rankfold.analysis import Analysis, Overrides, analyze, with_timings
from rankfold.batches import Data
from rankfold.checkpoint import load, read_record, save
from rankfold.compress import compress
from rankfold.deployment import fold_batch_norms, merge_adjacent
from rankfold.elastic import recover_elastic, slice_to
from rankfold.errors import (
    BudgetError,
    CalibrationError,
    CheckpointError,
    DeviceError,
    JournalError,
    ModelError,
    PlanError,
    RankError,
    RankfoldError,
    TensorError,
    UnsupportedLayerError,
)
from rankfold.export import Exported, export, write_source
from rankfold.factorize import factorize
from rankfold.from_disk import compress_from_disk
from rankfold.measure import Comparison, Measurement, accuracy, measure
from rankfold.plan import Plan
from rankfold.products import ProductTimes, choose_products
from rankfold.record import Record, record_of
from rankfold.recover import Recovery, recover, recover_blocks, reestimate_batch_norm
from rankfold.refit import Refit, refit
from rankfold.report import write_report
from rankfold.version import __version__

__all__ = [
    "Analysis",
    "BudgetError",
    "CalibrationError",
    "CheckpointError",
    "Comparison",
    "Data",
    "DeviceError",
    "Exported",
    "JournalError",
    "Measurement",
    "ModelError",
    "Overrides",
    "Plan",
    "PlanError",
    "ProductTimes",
    "RankError",
    "RankfoldError",
    "Record",
    "Recovery",
    "Refit",
    "TensorError",
    "UnsupportedLayerError",
    "__version__",
    "accuracy",
    "analyze",
    "choose_products",
    "compress",
    "compress_from_disk",
    "export",
    "factorize",
    "fold_batch_norms",
    "load",
    "measure",
    "merge_adjacent",
    "read_record",
    "record_of",
    "recover",
    "recover_blocks",
    "recover_elastic",
    "reestimate_batch_norm",
    "refit",
    "save",
    "slice_to",
    "with_timings",
    "write_report",
    "write_source",
]
