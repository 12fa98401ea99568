"""From a trained network to a smaller, faster, checked one, in one call."""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from rankfold.analysis import Analysis, Outputs, Overrides, analyze
from rankfold.batches import Data, Forward, device_of, first_batches, run
from rankfold.deployment import merge_adjacent
from rankfold.distances import Distance, SquaredError
from rankfold.elastic import recover_elastic, steps_down_to
from rankfold.errors import BudgetError
from rankfold.factorize import factorize
from rankfold.measure import Metric, evaluate, in_fastest_memory_format, measure
from rankfold.methods import Methods
from rankfold.outlook import look_ahead
from rankfold.plan import Plan
from rankfold.products import choose_products
from rankfold.progress import Progress, silent
from rankfold.record import attach_record, record_of
from rankfold.recover import LossFunction, Precision, Schedule, recover
from rankfold.runtime import Runtime, check_runtime
from rankfold.search import (
    cheapest_within,
    contenders,
    plan_to_latency,
    teacher_agreement,
    winner,
)


def compress(
    model: nn.Module,
    data: Data,
    *,
    params: float | None = None,
    macs: float | None = None,
    memory: float | None = None,
    latency: float | None = None,
    max_drop: float | None = None,
    contest: bool = False,
    energy: float | None = None,
    fraction: float | None = None,
    evbmf: bool = False,
    layers: str | Sequence[str] = "*",
    methods: Methods | None = None,
    overrides: Overrides = Overrides(),  # noqa: B008  (frozen)
    loss_metric: str = "auto",
    runtime: Runtime = "eager",
    outputs: Outputs | None = None,
    forward: Forward = run,
    epochs: int = 5,
    learning_rate: float = 3e-4,
    schedule: Schedule = "cosine",
    distance: Distance = SquaredError(),  # noqa: B008  (frozen)
    accumulation: int = 1,
    precision: Precision = "float32",
    tensorboard: str | os.PathLike[str] | None = None,
    loss_fn: LossFunction | None = None,
    validation: Data | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    elastic: float | None = None,
    merge: bool = False,
    test: Data | None = None,
    metric: Metric | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> nn.Module:
    """Analyze, plan, factorize, recover and measure; the compressed network, in eval mode.

    `data` yields batches (see `rankfold.batches`); labels are not needed. The budget is that of
    `Analysis.plan`, what may be factorized that of `analyze`, recovery that of `recover` with the
    original as the teacher (or with `loss_fn` on labels instead; `epochs=0` leaves it out). A
    budget of `latency` is kept as measured on the whole network, not only as predicted; where
    nothing can be gained, every layer stays dense. Instead of a budget, `max_drop` asks for the
    fewest MACs that lose, before recovery, at most so much of the metric on `validation` (by
    default `test`); without a metric, of the agreement with the original.

    Predicted losses do not always say which method the metric likes best: with `contest`, plans are
    also made in which one method takes every layer that it can take, and of all their networks the
    one with the best metric on `validation` (by default `test`) before recovery is taken; without a
    metric, the one that agrees most with the original.

    With `elastic`, a smaller budget of the same kind, the network is trained so that it can be cut
    down to any between (`slice_to`).

    With `merge` batch norms are folded at the end, and adjacent layers multiplied
    (`merge_adjacent`), which is for a network that is not trained further.

    Layers of small tensors keep their whole weight where that is faster (`choose_products`). The
    network is put in the memory format in which it runs faster, and compared with the original,
    itself in its faster format, on `test` (by default `data`): what `record_of(model).comparison`
    holds; `outlook` beside it holds the plans for other budgets. All times are those of the
    `runtime`. The original is left as it is.
    """
    budgets = {"params": params, "macs": macs, "memory": memory, "latency": latency}
    given = [name for name, value in budgets.items() if value is not None]
    if max_drop is not None and (given or energy or fraction or evbmf):
        raise BudgetError("ask for max_drop or for a budget, not for both")
    if contest and (max_drop is not None or not given):
        raise BudgetError("a contest is between plans of one budget: params, macs, memory, latency")
    steps_down = None
    if elastic is not None:
        if loss_fn is not None or merge or epochs == 0:
            raise BudgetError("an elastic network is trained without labels, and merged when cut")
        steps_down = steps_down_to(elastic, {name: budgets[name] or 0.0 for name in given})
    check_runtime(runtime)
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
        outputs=outputs,
        timed=latency is not None,
        runtime=runtime,
        seed=seed,
        progress=progress,
    )

    held_out = validation if validation is not None else judged

    def make_plan(source: Analysis, **budget: Any) -> Plan:
        asked = {"params": params, "macs": macs, "memory": memory, **budget}
        return source.plan(
            **asked, energy=energy, fraction=fraction, evbmf=evbmf, overrides=overrides
        )

    def planned(source: Analysis) -> tuple[Plan, nn.Module]:
        if latency is not None:
            timed = plan_to_latency(
                model,
                source,
                latency,
                next(first_batches(data, 1, device_of(model))),
                lambda aim: make_plan(source, latency=aim),
                forward=forward,
                progress=progress,
            )
            return timed.plan, timed.model
        if max_drop is not None:
            plan = cheapest_within(
                model,
                held_out,
                metric or teacher_agreement(model, forward),
                max_drop,
                lambda budget: make_plan(source, macs=budget),
                progress=progress,
            )
        else:
            plan = make_plan(source)
        return plan, factorize(model, plan, progress=progress)

    if contest:
        judge = metric or teacher_agreement(model, forward)
        plan, small = winner(contenders(analysis), planned, judge, held_out)
    else:
        plan, small = planned(analysis)
    outlook = look_ahead(analysis, overrides=overrides)
    record = replace(record_of(small), outlook=outlook)
    small = in_fastest_memory_format(small, batch, forward, progress, runtime)
    if epochs > 0 and plan.factorized:
        training: dict[str, Any] = {
            "teacher": model if loss_fn is None else None,
            "validation": validation,
            "forward": forward,
            "epochs": epochs,
            "learning_rate": learning_rate,
            "schedule": schedule,
            "distance": distance,
            "accumulation": accumulation,
            "precision": precision,
            "tensorboard": tensorboard,
            "checkpoint": checkpoint,
            "seed": seed,
            "progress": progress,
        }
        attach_record(small, record)
        if steps_down is not None:
            recover_elastic(small, analysis, data, budgets=steps_down, **training)
            record = record_of(small)
        else:
            score = metric if validation is not None else None
            recovery = recover(small, data, loss_fn=loss_fn, metric=score, **training)
            record = replace(record, recovery=recovery)
    attach_record(small, record)
    if merge:
        small = merge_adjacent(small, batch, forward=forward)
    choose_products(small, batch, forward=forward)
    comparison = measure(
        in_fastest_memory_format(model, batch, forward, progress, runtime),
        small,
        judged,
        metric=metric,
        forward=forward,
        runtime=runtime,
        progress=progress,
    )
    attach_record(small, replace(record_of(small), comparison=comparison))
    return small.eval()
