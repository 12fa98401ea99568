"""Statistics of batch norms after factorization, which shifts what they see."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rankfold.batches import Data, Forward, device_of, first_batches, run, run_or_explain, running
from rankfold.progress import Progress, silent

_BATCHES = 100


def reestimate_batch_norm(
    model: nn.Module, data: Data, *, forward: Forward = run, progress: Progress = silent
) -> None:
    """Replace running means and variances by those of the first 100 batches, in place.

    Everything else runs in eval mode; a model without batch norm is left as it is. Raises
    CalibrationError for data that yields nothing.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    with running(model), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over batches
            norm.train()
        found = first_batches(data, _BATCHES, device_of(model))
        for index, batch in enumerate(progress(found, "re-estimating batch norm")):
            run_or_explain(forward, model, batch, index)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
