"""Plans found by trying: what the clock and the metric say of the factorized network decides.

A plan is made from predictions. Here it is applied, the network is measured, and planned again
until it does what was asked for.
"""

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from rankfold.analysis import Analysis
from rankfold.analysis.curvature import classes_last, first_tensor, kind_of
from rankfold.analysis.latency import NetworkTiming
from rankfold.batches import (
    Data,
    Forward,
    batch_size,
    device_of,
    first_batches,
    run,
    run_or_explain,
    running,
)
from rankfold.copies import copy_of
from rankfold.errors import BudgetError
from rankfold.factorize import factorize
from rankfold.journal import NETWORK, Journal
from rankfold.measure import Metric, evaluate, latencies, output_error, with_memory_format
from rankfold.plan import LayerPlan, Plan
from rankfold.progress import Progress, silent
from rankfold.record import attach_record, record_of
from rankfold.replacement import put_in_place
from rankfold.runtime import Runtime, caller
from rankfold.unfusing import unfuse

_ROUNDS = 7
_CLOSE = 0.02  # of the dense time: near enough to the latency asked for
_NO_GAIN = 0.98  # a part that is not faster than this share of what it replaces is put back
_HALVINGS = 7

MakePlan = Callable[[float], Plan]

_NO_JOURNAL = Journal()


@dataclass(frozen=True)
class TimedPlan:
    """A plan, its network in the memory format it was timed in, and the share of dense time."""

    plan: Plan
    model: nn.Module
    share: float


def plan_to_latency(
    model: nn.Module,
    analysis: Analysis,
    latency: float,
    batch: Any,
    make_plan: MakePlan,
    *,
    forward: Forward = run,
    progress: Progress = silent,
) -> TimedPlan:
    """The plan whose whole network, measured beside the dense one, takes `latency` of its time.

    `latency` is a share of the dense time, or above 1 milliseconds. `make_plan` makes a plan for a
    predicted latency, or for another cost that time rises with; where the clock says otherwise it
    is asked again, in proportion, or between a prediction that came out too slow and one too fast;
    and what the plan predicts for the whole network is corrected by what the plan before it missed
    by. Layers whose dense form is as fast in the finished network are put back. If nothing can be
    gained at all, the plan leaves every layer dense. Raises BudgetError if the latency is out of
    reach.
    """
    assert analysis.timing is not None
    target = latency if latency <= 1 else latency / analysis.timing.dense_ms
    aim, best, missed_by = target, None, 1.0
    shares: dict[float, float] = {}  # of the dense time, by what was aimed for
    plans: list[tuple[LayerPlan, ...]] = []
    for _ in range(_ROUNDS):
        try:
            plan = make_plan(aim)
        except BudgetError as error:
            smallest = error.smallest.get("latency", 0.0)
            if best is not None:
                break
            if smallest >= 1:
                plan = replace(analysis.plan(macs=1.0), request={"latency": latency})
                return _dense_plan(model, plan, "no layer gets faster by any method")
            if smallest <= aim:  # it is another budget that is out of reach
                raise
            # Out of reach as predicted: what does the clock say of the fastest plan there is?
            aim = smallest * (1 + _CLOSE)
            plan = make_plan(aim)
        if plan.layers in plans:  # nothing lies between what was too slow and too fast
            break
        plans.append(plan.layers)
        tried = _timed(model, analysis, plan, batch, forward, progress)
        tried, missed_by = _corrected(tried, missed_by, analysis.timing.dense_ms)
        if best is None or _misses(tried.share, target) < _misses(best.share, target):
            best = tried
        shares[aim] = tried.share
        aim = _next_aim(shares, aim, target)
        # Dense layers everywhere, and nothing faster is known: it need not be tried again.
        is_hopeless = not plan.factorized and min(shares.values()) > target
        if abs(tried.share - target) <= _CLOSE or is_hopeless or aim in shares:
            break
    assert best is not None
    if best.share > target + _CLOSE and best.share < 1:
        raise BudgetError(
            f"latency cannot be brought to {target:.3g} of the dense network's: the clock says "
            f"{best.share:.3g} for the best plan",
            {"latency": best.share},
        )
    best = _put_back(model, best, batch, forward, analysis.timing, progress)
    plan = replace(best.plan, request={**best.plan.request, "latency": latency})
    if best.share >= 1:
        return _dense_plan(model, plan, "nothing that was tried was faster")
    attach_record(best.model, replace(record_of(best.model), plan=plan))
    return replace(best, plan=plan)


def _next_aim(shares: Mapping[float, float], last: float, target: float) -> float:
    """What to aim for: between the nearest that were too slow and too fast, or in proportion."""
    slower = [(share, aim) for aim, share in shares.items() if share > target]
    faster = [(share, aim) for aim, share in shares.items() if share <= target]
    if not slower or not faster:
        return min(max(last * target / shares[last], last / 2), 1.0)
    (above, most), (below, least) = min(slower), max(faster)
    return least + (most - least) * (target - below) / (above - below)


def _corrected(tried: TimedPlan, missed_by: float, dense_ms: float) -> tuple[TimedPlan, float]:
    """The plan, its predicted latency times this, and what should have been in its place."""
    predicted = tried.plan.after.latency_ms
    if not predicted:
        return tried, missed_by
    after = replace(tried.plan.after, latency_ms=missed_by * predicted)
    corrected = replace(tried, plan=replace(tried.plan, after=after))
    return corrected, tried.share * dense_ms / predicted


def _dense_plan(model: nn.Module, plan: Plan, reason: str) -> TimedPlan:
    """Every layer as it was, and why."""
    entries = tuple(
        _dense(entry, reason) if entry.reason is None else entry for entry in plan.layers
    )
    plan = replace(plan, layers=entries, after=plan.before)
    return TimedPlan(plan, factorize(model, plan), 1.0)


def _misses(share: float, target: float) -> float:
    """Too slow is worse than too fast."""
    return target - share if share <= target else 4 * (share - target)


def _timed(
    model: nn.Module,
    analysis: Analysis,
    plan: Plan,
    batch: Any,
    forward: Forward,
    progress: Progress,
) -> TimedPlan:
    assert analysis.timing is not None
    timing = analysis.timing
    small = with_memory_format(factorize(model, plan).eval(), timing.memory_format)
    networks = [small, model]
    if timing.memory_format != "contiguous":
        networks.append(with_memory_format(model, timing.memory_format))
    ours, *dense = _milliseconds(networks, batch, forward, timing.runtime, progress)
    return TimedPlan(plan, small, ours / min(dense))


def _milliseconds(
    networks: list[nn.Module], batch: Any, forward: Forward, runtime: Runtime, progress: Progress
) -> list[float]:
    with contextlib.ExitStack() as stack:
        for network in networks:
            stack.enter_context(running(network))
        stack.enter_context(torch.no_grad())
        calls = [caller(network, batch, forward, runtime) for network in networks]
        return latencies(calls, device_of(networks[0]), progress)


def _put_back(
    model: nn.Module,
    timed: TimedPlan,
    batch: Any,
    forward: Forward,
    timing: NetworkTiming,
    progress: Progress,
) -> TimedPlan:
    """With every layer dense again that gains nothing in the finished network.

    Only those are tried whose predicted gain is small. A layer that has taken in the readout of a
    recurrent one stays as it is, or becomes dense together with it.
    """
    readers = {entry.reader for entry in timed.plan.factorized}
    doubtful = [
        entry
        for entry in timed.plan.factorized
        if entry.name not in readers
        and entry.after.latency_ms is not None
        and entry.before.latency_ms is not None
        and entry.after.latency_ms > 0.8 * entry.before.latency_ms
    ]
    restored: list[str] = []
    share = timed.share
    original = unfuse(copy_of(model), [entry.name for entry in doubtful])
    for entry in progress(doubtful, "putting back what does not pay"):
        names = [entry.name, *entry.tied, *([] if entry.reader is None else [entry.reader])]
        other = copy_of(timed.model)
        back = {
            other.get_submodule(name): with_memory_format(
                original.get_submodule(name), timing.memory_format
            )
            for name in names
        }
        networks = [timed.model, put_in_place(other, back)]
        factorized, dense = _milliseconds(networks, batch, forward, timing.runtime, silent)
        if factorized > _NO_GAIN * dense:
            restored.append(entry.name)
            share *= dense / factorized
    if not restored:
        return timed
    entries = tuple(
        _dense(entry, "its factors gain no time in the network")
        if entry.name in restored
        else entry
        for entry in timed.plan.layers
    )
    plan = timed.plan.with_layers(entries)
    small = with_memory_format(factorize(model, plan).eval(), timing.memory_format)
    return TimedPlan(plan, small, share)


def _dense(entry: LayerPlan, reason: str) -> LayerPlan:
    return LayerPlan(entry.name, entry.layer, entry.before, entry.before, reason=reason)


def cheapest_within(
    model: nn.Module,
    data: Data,
    metric: Metric,
    max_drop: float,
    make_plan: MakePlan,
    progress: Progress = silent,
    journal: Journal = _NO_JOURNAL,
) -> Plan:
    """The plan of the least budget whose network loses at most `max_drop` of the metric.

    Measured on `data` before any recovery. `make_plan` makes a plan for a budget between 0 and 1,
    and the budget is bisected. What was measured is kept in the journal. Raises BudgetError if no
    budget tried keeps the metric.
    """
    if not max_drop >= 0:
        raise BudgetError(f"max_drop={max_drop} must not be negative")
    dense = journal.once(f"{NETWORK}/score of the original", lambda: evaluate(metric, model, data))
    least = dense - max_drop
    low, high, best = 0.0, 1.0, None

    def score(plan: Plan) -> float:
        return evaluate(metric, factorize(model, plan, journal=journal), data)

    for _ in progress(range(_HALVINGS), "searching the cheapest plan"):
        middle = (low + high) / 2
        try:
            plan = make_plan(middle)
        except BudgetError as error:
            low = max([middle, *(v for v in error.smallest.values() if v < high)])
            continue
        if journal.once(_score_of(plan), partial(score, plan)) >= least:
            best, high = plan, middle
        else:
            low = middle
    if best is None:
        raise BudgetError(
            f"no plan that was tried loses at most {max_drop} of the metric before recovery: "
            "allow for more with max_drop, or ask for a budget"
        )
    return best


def _score_of(plan: Plan) -> str:
    """The name of a plan's metric in a journal."""
    chosen = [(one.name, one.method, one.settings, one.rank) for one in plan.layers]
    return f"{NETWORK}/score {hashlib.sha256(json.dumps(chosen).encode()).hexdigest()}"


def contenders(analysis: Analysis) -> dict[str, Analysis]:
    """What plans can be made from: all methods, one wherever it can be, and all but one, by name.

    Only those of methods that take more than one layer; of what comes to the same, the first.
    """
    counts = Counter(method for offered in _offers(analysis) for method in offered)
    several = sorted(method for method, count in counts.items() if count > 1)
    found = {"all": analysis}
    found |= {method: analysis.preferring(method) for method in several}
    found |= {f"all but {method}": analysis.without(method) for method in several}
    first = {_offers(one): name for name, one in reversed(found.items())}
    return {name: one for name, one in found.items() if first[_offers(one)] == name}


def _offers(analysis: Analysis) -> tuple[frozenset[str], ...]:
    """The methods that can be chosen for each layer."""
    return tuple(frozenset(one.method for one in layer.candidates) for layer in analysis.layers)


def winner(
    attempts: Iterable[Callable[[], tuple[Plan, nn.Module]]],
    metric: Metric,
    data: Data,
    journal: Journal = _NO_JOURNAL,
) -> tuple[Plan, nn.Module]:
    """Of the plans that can be made, the one whose network does best by a metric.

    Of equals the first; one that leaves every layer dense only if all do. What was measured is kept
    in the journal. Raises BudgetError where none can be made.
    """
    best: tuple[tuple[bool, float], Plan, nn.Module] | None = None
    refused: BudgetError | None = None
    for attempt in attempts:
        try:
            plan, small = attempt()
        except BudgetError as error:
            refused = refused or error
            continue
        found = journal.once(_score_of(plan), partial(evaluate, metric, small, data))
        score = bool(plan.factorized), found
        if best is None or score > best[0]:
            best = score, plan, small
    if best is None:
        assert refused is not None
        raise refused
    return best[1:]


def teacher_agreement(teacher: nn.Module, forward: Forward = run) -> Metric:
    """A metric that needs no labels: how often a model decides as the teacher does.

    For outputs that look like logits, the share of positions with the same greatest one; for values
    1 minus the relative error of the outputs, 0 at least.
    """

    def agreement(model: nn.Module, data: Data) -> float:
        same = total = 0.0
        for index, batch in enumerate(first_batches(data, None, device_of(model))):
            with running(teacher), torch.no_grad():
                target = run_or_explain(forward, teacher, batch, index)
                output = run_or_explain(forward, model, batch, index)
            if kind_of(target) == "logits":
                ours, theirs = (classes_last(first_tensor(o)).argmax(-1) for o in (output, target))
                same += int((ours == theirs).sum())
                total += ours.numel()
            else:
                same += batch_size(batch) * max(0.0, 1 - output_error(target, output))
                total += batch_size(batch)
        return same / total

    return agreement
