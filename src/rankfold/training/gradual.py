"""Ranks cut in steps, with a recovery after each and a new plan for the next."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from rankfold.analysis import Analysis, Overrides, analyze
from rankfold.batches import Data, Forward, run
from rankfold.distances import Distance, SquaredError
from rankfold.errors import BudgetError, RankfoldError
from rankfold.factorize import factorize
from rankfold.measure import Metric
from rankfold.methods import Methods, ProjectUnits, RemoveUnits, make_methods
from rankfold.plan import Plan
from rankfold.progress import Progress, silent
from rankfold.record import attach_record, record_of
from rankfold.recover import LossFunction, Penalty, Schedule, recover
from rankfold.training.dense import dense_again

_NO_OVERRIDES = Overrides()


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
    seed: int = 0,
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
    loaded like any other. The original is left as it is. Raises BudgetError, before anything is
    trained, for a budget that is out of reach, RankfoldError for less than one step.
    """
    if type(steps) is not int or steps < 1:
        raise RankfoldError(f"steps={steps} must be an integer of at least 1")
    asked = {"params": params, "macs": macs, "memory": memory}
    budgets = {name: value for name, value in asked.items() if value is not None}
    if not budgets:
        raise BudgetError("ask for params, macs or memory")
    chosen = make_methods(methods)

    def look(network: nn.Module) -> Analysis:
        return analyze(
            network,
            data,
            forward=forward,
            layers=layers,
            methods=chosen,
            metric=loss_metric,
            seed=seed,
            progress=progress,
        )

    def step_down(network: nn.Module, plan: Plan) -> nn.Module:
        small = factorize(network, plan, progress=progress)
        recovery = recover(
            small,
            data,
            teacher=model if loss_fn is None else None,
            distance=distance,
            loss_fn=loss_fn,
            penalty=penalty,
            validation=validation,
            metric=metric if validation is not None else None,
            forward=forward,
            epochs=epochs,
            learning_rate=learning_rate,
            schedule=schedule,
            seed=seed,
            progress=progress,
        )
        attach_record(small, replace(record_of(small), recovery=recovery))
        return small

    analysis = look(model)
    whole = _fractions(analysis, budgets)
    on_the_way = [
        {name: fraction ** (step / steps) for name, fraction in whole.items()}
        for step in range(1, steps)
    ]
    # What is out of reach is better known before the work.
    _plan(analysis, budgets, overrides)
    for shares in on_the_way:
        _plan(_reversible(analysis), shares, overrides)
    current = model
    for shares in on_the_way:
        plan = _plan(_reversible(analysis), shares, overrides)
        current = dense_again(step_down(current, plan), like=model)
        analysis = look(current)
    return step_down(current, _plan(analysis, budgets, overrides))


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
