"""From a trained network to a smaller, faster, checked one, in one call."""

import functools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from rankfold import processes
from rankfold.analysis import Analysis, Outputs, Overrides, analyze
from rankfold.analysis.analyze import analysis_request
from rankfold.batches import Data, Forward, device_of, first_batches, run
from rankfold.checkpoint import load, save
from rankfold.deployment import merge_adjacent
from rankfold.distances import Distance, SquaredError
from rankfold.documents import read
from rankfold.elastic import recover_elastic, steps_down_to
from rankfold.errors import BudgetError, CheckpointError
from rankfold.factorize import factorize
from rankfold.journal import (
    ANALYSIS,
    FACTORS,
    NETWORK,
    Journal,
    Pathlike,
    Request,
    opened,
)
from rankfold.measure import Comparison, Metric, evaluate, in_fastest_memory_format, measure
from rankfold.methods import Methods
from rankfold.outlook import look_ahead
from rankfold.plan import Plan
from rankfold.products import choose_products
from rankfold.progress import Progress, silent
from rankfold.record import attach_record, record_of
from rankfold.recover import LossFunction, Precision, Schedule, recover
from rankfold.request import beyond_defaults, request
from rankfold.runtime import Runtime, check_runtime
from rankfold.search import (
    cheapest_within,
    contenders,
    plan_to_latency,
    teacher_agreement,
    winner,
)

UNASKED_DROP = 0.01
"""What `compress` lets a network lose of its metric before recovery, where nothing is asked for."""

# In a journal.
_FACTORIZED, _RECOVERED = f"{NETWORK}/factorized", f"{NETWORK}/recovered"
_TRAINING = f"{NETWORK}/training.entry"


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
    sharded: bool = False,
    tensorboard: str | os.PathLike[str] | None = None,
    loss_fn: LossFunction | None = None,
    validation: Data | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    elastic: float | None = None,
    merge: bool = False,
    test: Data | None = None,
    metric: Metric | None = None,
    seed: int = 0,
    journal: Journal | Pathlike | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> nn.Module:
    """Analyze, plan, factorize, recover and measure; the compressed network, in eval mode.

    `data` yields batches (see `rankfold.batches`); labels are not needed. The budget is that of
    `Analysis.plan`, what may be factorized that of `analyze`, recovery that of `recover` with the
    original as the teacher (or with `loss_fn` on labels instead; `epochs=0` leaves it out), not
    `sharded` where it is `elastic`. A budget of `latency` is kept as measured on the whole network,
    not only as predicted; where nothing can be gained, every layer stays dense. Instead of a
    budget, `max_drop` asks for the fewest MACs that lose, before recovery, at most so much of the
    metric on `validation` (by default `test`); without a metric, of the agreement with the
    original. With nothing asked for, that is `UNASKED_DROP`.

    Predicted losses do not always say which plan the metric likes best: with `contest`, plans are
    also made in which one method takes every layer that it can take, in which one is left out, and
    for a latency by MACs, at the share of them that takes so long (unless `macs` is given, too);
    and of all their networks the one with the best metric on `validation` (by default `test`)
    before recovery is taken; without a metric, the one that agrees most with the original.

    With `elastic`, a smaller budget of the same kind, the network is trained so that it can be cut
    down to any between (`slice_to`).

    With `merge` batch norms are folded at the end, and adjacent layers multiplied
    (`merge_adjacent`), which is for a network that is not trained further.

    Layers of small tensors keep their whole weight where that is faster (`choose_products`). The
    network is put in the memory format in which it runs faster, and compared with the original,
    itself in its faster format, on `test` (by default `data`): what `record_of(model).comparison`
    holds; `outlook` beside it holds the plans for other budgets. All times are those of the
    `runtime`. The original is left as it is.

    What is finished is kept in the directory `journal`; where the same call was killed, it goes on
    from there, to the same network. A journal of another call is refused with a JournalError; with
    `force` what that call made is thrown away, but for the analysis if it is that of this call too.
    Remove the directory when the network has been saved.
    """
    asked: dict[str, Any] = {
        "forward": forward,
        "layers": layers,
        "methods": methods,
        "metric": loss_metric,
        "outputs": outputs,
        "timed": latency is not None,
        "runtime": runtime,
        "seed": seed,
    }
    beside: dict[str, Any] = {
        "params": params,
        "macs": macs,
        "memory": memory,
        "latency": latency,
        "max_drop": max_drop,
        "contest": contest,
        "energy": energy,
        "fraction": fraction,
        "evbmf": evbmf,
        "overrides": overrides,
        "epochs": epochs,
        "learning_rate": learning_rate,
        "schedule": schedule,
        "distance": distance,
        "accumulation": accumulation,
        "precision": precision,
        "sharded": sharded,
        "loss_fn": loss_fn,
        "elastic": elastic,
        "merge": merge,
        "metric": metric,
    }

    def make_request() -> Request:
        judging = {"validation": validation, "test": test}
        return {
            ANALYSIS: analysis_request(model, data, **asked),
            FACTORS: {},
            NETWORK: request(None, judging, beyond_defaults(compress, beside)),
        }

    budgets = {"params": params, "macs": macs, "memory": memory, "latency": latency}
    given = [name for name, value in budgets.items() if value is not None]
    if max_drop is not None and (given or energy or fraction or evbmf):
        raise BudgetError("ask for max_drop or for a budget, not for both")
    if not (given or energy or fraction or evbmf or contest or elastic):
        max_drop = UNASKED_DROP if max_drop is None else max_drop
    if contest and (max_drop is not None or not given):
        raise BudgetError("a contest is between plans of one budget: params, macs, memory, latency")
    steps_down = None
    if elastic is not None:
        if loss_fn is not None or merge or epochs == 0:
            raise BudgetError("an elastic network is trained without labels, and merged when cut")
        steps_down = steps_down_to(elastic, {name: budgets[name] or 0.0 for name in given})
    check_runtime(runtime)
    processes.join(device_of(model))
    judged = test if test is not None else data
    held_out = validation if validation is not None else judged
    batch = next(first_batches(judged, 1, device_of(model)))
    if metric is not None:
        evaluate(metric, model, [batch])  # what cannot be judged is better known before the work

    with opened(journal, make_request, force) as book:

        @functools.cache
        def analysis() -> Analysis:
            return analyze(model, data, **asked, journal=book, progress=progress)

        def make_plan(source: Analysis, **budget: Any) -> Plan:
            asked_for = {"params": params, "macs": macs, "memory": memory, **budget}
            return source.plan(
                **asked_for, energy=energy, fraction=fraction, evbmf=evbmf, overrides=overrides
            )

        def planned(source: Analysis, cost: str = "latency") -> tuple[Plan, nn.Module]:
            """For a latency brought to it by the clock, through budgets of this cost."""
            if latency is not None:

                def for_budget(aim: float) -> Plan:
                    plan = make_plan(source, **{cost: aim})
                    asked_for = {k: v for k, v in plan.request.items() if k != cost}
                    return replace(plan, request=asked_for)

                timed = plan_to_latency(
                    model,
                    source,
                    latency,
                    next(first_batches(data, 1, device_of(model))),
                    for_budget,
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
                    journal=book,
                )
            else:
                plan = make_plan(source)
            return plan, factorize(model, plan, journal=book, progress=progress)

        def make_factorized() -> nn.Module:
            book.forget(_TRAINING)  # of another network, if another came out then
            if contest:
                judge = metric or teacher_agreement(model, forward)
                attempts = [
                    functools.partial(planned, one) for one in contenders(analysis()).values()
                ]
                if latency is not None and macs is None:
                    attempts.append(functools.partial(planned, analysis(), "macs"))
                _, small = winner(attempts, judge, held_out, book)
            else:
                _, small = planned(analysis())
            outlook = look_ahead(analysis(), overrides=overrides)
            attach_record(small, replace(record_of(small), outlook=outlook))
            return in_fastest_memory_format(small, batch, forward, progress, runtime)

        def make_recovered() -> nn.Module:
            small = _saved(book, _FACTORIZED, model, make_factorized)
            if epochs > 0 and record_of(small).plan.factorized:
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
                    "sharded": sharded,
                    "tensorboard": tensorboard,
                    "checkpoint": checkpoint or book.sound(_TRAINING),
                    "seed": seed,
                    "progress": progress,
                }
                if steps_down is not None:
                    recover_elastic(small, analysis(), data, budgets=steps_down, **training)
                else:
                    score = metric if validation is not None else None
                    recovery = recover(small, data, loss_fn=loss_fn, metric=score, **training)
                    attach_record(small, replace(record_of(small), recovery=recovery))
            if merge:
                small = merge_adjacent(small, batch, forward=forward)
            choose_products(small, batch, forward=forward)
            return small

        small = _saved(book, _RECOVERED, model, make_recovered)
        for done in (FACTORS, _FACTORIZED, _TRAINING):
            book.forget(done)
        comparison = book.once(
            f"{NETWORK}/comparison",
            lambda: measure(
                in_fastest_memory_format(model, batch, forward, progress, runtime),
                small,
                judged,
                metric=metric,
                forward=forward,
                runtime=runtime,
                progress=progress,
            ),
            lambda found: json.dumps(asdict(found)),
            lambda text: read(Comparison, json.loads(text), "comparison"),
        )
    attach_record(small, replace(record_of(small), comparison=comparison))
    return small.eval()


def _saved(
    journal: Journal, name: str, original: nn.Module, make: Callable[[], nn.Module]
) -> nn.Module:
    """A factorized network: read from the journal if it is there, else made and saved."""
    path = journal.path(name)
    if path is None:
        return make()
    found = processes.from_first(lambda: _loaded(path, original))
    if found is None:
        found = make()
        journal.forget(name)
        save(found, path)
    return found.to(device_of(original))


def _loaded(path: Path, original: nn.Module) -> nn.Module | None:
    try:
        return load(path, original) if path.is_dir() else None
    except CheckpointError:
        return None
