"""From a trained network to a smaller, faster, checked one, in one call."""

import os
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from rankfold.analysis import analyze
from rankfold.batches import Data, Forward, device_of, first_batches, run
from rankfold.factorize import factorize
from rankfold.measure import Metric, evaluate, in_fastest_memory_format, measure
from rankfold.methods import Method
from rankfold.progress import Progress, silent
from rankfold.record import attach_record, record_of
from rankfold.recover import LossFunction, Schedule, recover


def compress(
    model: nn.Module,
    data: Data,
    *,
    params: float | None = None,
    macs: float | None = None,
    energy: float | None = None,
    fraction: float | None = None,
    evbmf: bool = False,
    layers: str | Sequence[str] = "*",
    methods: Sequence[Method] | None = None,
    loss_metric: str = "weight",
    forward: Forward = run,
    epochs: int = 5,
    learning_rate: float = 3e-4,
    schedule: Schedule = "cosine",
    loss_fn: LossFunction | None = None,
    validation: Data | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    test: Data | None = None,
    metric: Metric | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> nn.Module:
    """Analyze, plan, factorize, recover and measure; the compressed network, in eval mode.

    `data` yields batches (see `rankfold.batches`); labels are not needed. The budget is that of
    `Analysis.plan`, what may be factorized that of `analyze`, recovery that of `recover` with the
    original as the teacher (or with `loss_fn` on labels instead; `epochs=0` leaves it out). The
    network is then put in the memory format in which it runs faster, and compared with the
    original, itself in its faster format, on `test` (by default `data`): what
    `record_of(model).comparison` holds. The original is left as it is.
    """
    judged = test if test is not None else data
    batch = next(first_batches(judged, 1, device_of(model)))
    if metric is not None:
        evaluate(metric, model, [batch])  # what cannot be judged is better known before the work
    analysis = analyze(
        model,
        data,
        forward=forward,
        layers=layers,
        methods=methods,
        metric=loss_metric,
        progress=progress,
    )
    plan = analysis.plan(params=params, macs=macs, energy=energy, fraction=fraction, evbmf=evbmf)
    small = factorize(model, plan, progress=progress)
    record = record_of(small)
    small = in_fastest_memory_format(small, batch, forward, progress)
    if epochs > 0 and plan.factorized:
        recovery = recover(
            small,
            data,
            teacher=model if loss_fn is None else None,
            loss_fn=loss_fn,
            validation=validation,
            metric=metric if validation is not None else None,
            forward=forward,
            epochs=epochs,
            learning_rate=learning_rate,
            schedule=schedule,
            checkpoint=checkpoint,
            seed=seed,
            progress=progress,
        )
        record = replace(record, recovery=recovery)
    comparison = measure(
        in_fastest_memory_format(model, batch, forward, progress),
        small,
        judged,
        metric=metric,
        forward=forward,
        progress=progress,
    )
    attach_record(small, replace(record, comparison=comparison))
    return small.eval()
