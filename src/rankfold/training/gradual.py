"""Ranks cut in steps, with a recovery after each and a new plan for the next."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from rankfold.analysis import Analysis, Overrides, analyze
from rankfold.batches import Data, Forward, run
from rankfold.copies import copy_of
from rankfold.distances import Distance, SquaredError
from rankfold.errors import BudgetError, RankfoldError
from rankfold.factorize import factorize
from rankfold.journal import Journal, Pathlike, opened
from rankfold.measure import Metric
from rankfold.methods import Methods, ProjectUnits, RemoveUnits, make_methods
from rankfold.plan import Plan
from rankfold.progress import Progress, silent
from rankfold.record import attach_record, record_of
from rankfold.recover import LossFunction, Penalty, Precision, Schedule, recover
from rankfold.request import beyond_defaults, request
from rankfold.training.dense import dense_again

_NO_OVERRIDES = Overrides()
_STEPS = "steps"  # the stage in a journal


def gradually(
    model: nn.Module,
    data: Data,
    *,
    params: float | None = None,
    macs: float | None = None,
    memory: float | None = None,
    steps: int = 3,
    layers: str | Sequence[str] = "*",
    methods: Methods | None = None,
    loss_metric: str = "auto",
    overrides: Overrides = _NO_OVERRIDES,
    loss_fn: LossFunction | None = None,
    distance: Distance = SquaredError(),  # noqa: B008  (frozen)
    penalty: Penalty | None = None,
    validation: Data | None = None,
    metric: Metric | None = None,
    forward: Forward = run,
    epochs: int = 2,
    learning_rate: float = 3e-4,
    schedule: Schedule = "cosine",
    precision: Precision = "float32",
    seed: int = 0,
    journal: Journal | Pathlike | None = None,
    progress: Progress = silent,
) -> nn.Module:
    """Compress a trained network a bit, recover it, and go on from there; the last network.

    The budgets are those of `Analysis.plan`, reached in so many `steps`, each the same factor below
    the one before. Every step analyzes the network that the last recovery left, made dense again
    (`dense_again`), so that the next cut goes by what its weights have become. Recovery is that of
    `recover`, `epochs` after each step, towards the original's outputs or, with `loss_fn`, on
    labels. Fewer units of recurrent layers, which cannot be made dense again, are for the last step
    alone.

    The plan that the network remembers is of the original's architecture, so that it is saved and
    loaded like any other. The original is left as it is. What is finished is kept in the directory
    `journal`, from which the same call goes on where it was killed; remove it when the network has
    been saved.

    Raises BudgetError, before anything is trained, for a budget that is out of reach, RankfoldError
    for less than one step, JournalError for a journal of something else.
    """
    if type(steps) is not int or steps < 1:
        raise RankfoldError(f"steps={steps} must be an integer of at least 1")
    asked = {"params": params, "macs": macs, "memory": memory}
    budgets = {name: value for name, value in asked.items() if value is not None}
    if not budgets:
        raise BudgetError("ask for params, macs or memory")
    chosen = make_methods(methods)
    asked_of_analysis: dict[str, Any] = {
        "forward": forward,
        "layers": layers,
        "methods": chosen,
        "metric": loss_metric,
        "seed": seed,
    }
    asked_of_recovery: dict[str, Any] = {
        "distance": distance,
        "loss_fn": loss_fn,
        "penalty": penalty,
        "metric": metric if validation is not None else None,
        "forward": forward,
        "epochs": epochs,
        "learning_rate": learning_rate,
        "schedule": schedule,
        "precision": precision,
        "seed": seed,
    }

    def make_request() -> dict[str, dict[str, str]]:
        asked = {**budgets, "steps": steps, "overrides": overrides, "layers": layers}
        asked |= {"methods": chosen, "loss_metric": loss_metric, **asked_of_recovery}
        every = {"data": data, "validation": validation}
        return {_STEPS: request(model, every, beyond_defaults(gradually, asked))}

    with opened(journal, make_request) as book:

        @functools.lru_cache(maxsize=1)
        def look(network: nn.Module, step: int) -> Analysis:
            kept = book.path(f"{_STEPS}/analysis-{step}")
            return analyze(network, data, **asked_of_analysis, journal=kept, progress=progress)

        def fractions() -> list[dict[str, float]]:
            """On the way to the budgets. What is out of reach is better known before the work."""
            analysis = look(model, 1)
            whole = _fractions(analysis, budgets).items()
            found = [{n: one ** (step / steps) for n, one in whole} for step in range(1, steps)]
            _plan(analysis, budgets, overrides)
            for shares in found:
                _plan(_reversible(analysis), shares, overrides)
            return found

        def step_down(network: nn.Module, plan: Plan, step: int) -> nn.Module:
            kept = book.path(f"{_STEPS}/factors-{step}")
            small = factorize(network, plan, journal=kept, progress=progress)
            recovery = recover(
                small,
                data,
                teacher=model if loss_fn is None else None,
                validation=validation,
                checkpoint=book.sound(f"{_STEPS}/training-{step}.entry"),
                progress=progress,
                **asked_of_recovery,
            )
            attach_record(small, replace(record_of(small), recovery=recovery))
            return small

        def next_dense(network: nn.Module, shares: Mapping[str, float], step: int) -> nn.Module:
            plan = _plan(_reversible(look(network, step)), shares, overrides)
            return dense_again(step_down(network, plan, step), like=model)

        current = model
        for step, shares in enumerate(book.once(f"{_STEPS}/budgets", fractions), 1):
            make = functools.partial(next_dense, current, shares, step)
            current = _once(book, f"{_STEPS}/network-{step}", make, model)
            for done in ("analysis-{}", "factors-{}", "training-{}.entry"):
                book.forget(f"{_STEPS}/{done.format(step)}")
        return step_down(current, _plan(look(current, steps), budgets, overrides), steps)


def _once(journal: Journal, name: str, make: Callable[[], nn.Module], like: nn.Module) -> nn.Module:
    """A network of the kind of `like`, kept by its state."""

    def with_state(state: Mapping[str, torch.Tensor]) -> nn.Module:
        network = copy_of(like)
        network.load_state_dict(state)
        return network

    return journal.once(name, make, lambda network: network.state_dict(), with_state)


def _plan(analysis: Analysis, budgets: Mapping[str, float], overrides: Overrides) -> Plan:
    asked: Any = budgets
    return analysis.plan(**asked, overrides=overrides)


def _fractions(analysis: Analysis, budgets: Mapping[str, float]) -> dict[str, float]:
    """Budgets, which may be absolute, as fractions of the dense network, at most 1."""
    dense = {
        "params": analysis.parameters,
        "macs": analysis.macs / analysis.batch_size,
        "memory": analysis.weight_bytes,
    }
    fractions = {n: value if value <= 1 else value / dense[n] for n, value in budgets.items()}
    return {name: min(fraction, 1.0) for name, fraction in fractions.items()}


def _reversible(analysis: Analysis) -> Analysis:
    """Without what no dense layer is equal to, which has to wait for the last step."""
    layers = tuple(
        replace(
            layer,
            candidates=tuple(
                one
                for one in layer.candidates
                if not isinstance(layer.methods[one.method], RemoveUnits | ProjectUnits)
            ),
        )
        for layer in analysis.layers
    )
    return replace(analysis, layers=layers)
