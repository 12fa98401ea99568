import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from networks import make_data, make_labelled, make_model
from torch import nn

import rankfold
from rankfold import search
from rankfold.analysis import Analysis
from rankfold.analysis.latency import NetworkTiming
from rankfold.batches import run
from rankfold.errors import BudgetError
from rankfold.measure import accuracy
from rankfold.progress import silent
from rankfold.search import (
    _next_aim,
    cheapest_within,
    contenders,
    plan_to_latency,
    teacher_agreement,
    winner,
)


@pytest.fixture(scope="module")
def analysis() -> rankfold.Analysis:
    return rankfold.analyze(make_model(), make_data(), metric="weight", timed=True)


def clock(monkeypatch, milliseconds) -> None:
    """Times every network by a function of its parameters instead of the clock."""

    def latencies(calls, device, progress=None):
        counts = [sum(p.numel() for p in call.networks.parameters()) for call in calls]
        return [milliseconds(count) for count in counts]

    def caller(network, batch, forward, runtime):
        def run():
            return forward(network, batch)

        run.networks = network
        return run

    monkeypatch.setattr(search, "latencies", latencies)
    monkeypatch.setattr(search, "caller", caller)


def test_the_latency_is_what_the_clock_says_and_not_what_was_predicted(
    analysis, monkeypatch
) -> None:
    """The clock goes by parameters here, the predictions by measured layers."""
    clock(monkeypatch, float)
    asked: list[float] = []

    def make_plan(aim: float) -> rankfold.Plan:
        asked.append(aim)
        return analysis.plan(params=min(1.0, 0.8 * aim + 0.1))

    model = make_model()
    timed = plan_to_latency(model, analysis, 0.5, make_data()[0], make_plan)
    assert timed.share == pytest.approx(0.5, abs=0.07)  # ranks are multiples of 8
    assert timed.plan.after.parameters == sum(p.numel() for p in timed.model.parameters())
    assert asked[0] == 0.5 and len(asked) <= 5


def test_the_next_aim_is_between_what_was_too_slow_and_what_was_too_fast() -> None:
    assert _next_aim({0.5: 0.6}, 0.5, 0.5) == pytest.approx(0.5 * 0.5 / 0.6)
    assert _next_aim({0.5: 2.0}, 0.5, 0.5) == 0.25  # at most by half at a time
    assert _next_aim({0.5: 0.1}, 0.5, 0.5) == 1.0
    assert _next_aim({0.5: 0.6, 0.4: 0.4}, 0.4, 0.5) == pytest.approx(0.45)
    # Of the nearest on both sides; also where less was aimed for and more came out.
    shares = {0.5: 0.9, 0.45: 0.6, 0.4: 0.3, 0.48: 0.4}
    assert _next_aim(shares, 0.48, 0.5) == pytest.approx(0.465)


def test_after_a_plan_much_too_fast_and_none_at_all_one_between_is_found(
    analysis, monkeypatch
) -> None:
    """A first plan that came out much too fast has the next one aim for the dense network."""
    clock(monkeypatch, float)
    plans: list[rankfold.Plan] = []

    def make_plan(aim: float) -> rankfold.Plan:
        plans.append(analysis.plan(params=max(0.3, 2 * aim - 1)))
        return plans[-1]

    timed = plan_to_latency(make_model(), analysis, 0.65, make_data()[0], make_plan)
    assert not plans[1].factorized
    assert timed.share == pytest.approx(0.65, abs=0.05)


def test_where_nothing_is_gained_every_layer_stays_dense(analysis, monkeypatch) -> None:
    clock(monkeypatch, lambda count: 1.0)
    model = make_model()
    make_plan = lambda aim: analysis.plan(params=0.5)  # noqa: E731
    timed = plan_to_latency(model, analysis, 0.5, make_data()[0], make_plan)
    assert not timed.plan.factorized and timed.share == 1
    assert timed.plan.after == timed.plan.before
    with torch.no_grad():
        batch = make_data()[0]
        assert torch.equal(timed.model(batch), model(batch))


def test_a_latency_out_of_reach_is_refused_with_what_was_reached(analysis, monkeypatch) -> None:
    clock(monkeypatch, lambda count: 1.0 if count > 50_000 else 0.8)
    with pytest.raises(BudgetError, match="the clock says") as caught:
        plan_to_latency(
            make_model(), analysis, 0.2, make_data()[0], lambda aim: analysis.plan(params=0.4)
        )
    assert caught.value.smallest["latency"] == pytest.approx(0.8)


def test_a_plan_out_of_reach_as_predicted_is_tried_all_the_same(analysis, monkeypatch) -> None:
    """The clock is kinder than the predictions."""
    clock(monkeypatch, float)
    asked: list[float] = []

    def make_plan(aim: float) -> rankfold.Plan:
        asked.append(aim)
        if aim < 0.6:
            raise BudgetError("out of reach", {"latency": 0.6})
        return analysis.plan(params=0.5)

    timed = plan_to_latency(make_model(), analysis, 0.5, make_data()[0], make_plan)
    assert asked[0] == 0.5 and asked[1] == pytest.approx(0.6, rel=0.05)
    assert timed.share == pytest.approx(0.5, abs=0.07)


def test_predictions_are_corrected_by_what_the_plan_before_missed_by(analysis) -> None:
    plan = analysis.plan(params=0.5)

    def tried(predicted: float | None, share: float) -> search.TimedPlan:
        after = replace(plan.after, latency_ms=predicted)
        return search.TimedPlan(replace(plan, after=after), make_model(), share)

    first, missed_by = search._corrected(tried(10.0, 0.4), 1.0, 50.0)
    assert first.plan.after.latency_ms == 10 and missed_by == 2
    second, missed_by = search._corrected(tried(8.0, 0.32), missed_by, 50.0)
    assert second.plan.after.latency_ms == 16 and missed_by == 2
    assert search._corrected(tried(None, 0.3), 2.0, 50.0)[1] == 2


def test_the_users_model_keeps_its_modes(analysis, monkeypatch) -> None:
    clock(monkeypatch, float)
    model = make_model().train()
    model.norm.eval()
    plan_to_latency(model, analysis, 0.5, make_data()[0], lambda aim: analysis.plan(params=aim))
    assert model.training and not model.norm.training


def test_the_cheapest_plan_keeps_the_metric(analysis) -> None:
    model, labelled = make_model(), make_labelled()
    plan = cheapest_within(
        model, labelled, rankfold.accuracy, 0.1, lambda budget: analysis.plan(macs=budget)
    )
    assert rankfold.accuracy(rankfold.factorize(model, plan), labelled) >= 0.9
    assert plan.after.macs < plan.before.macs
    cheaper = analysis.plan(macs=0.5 * plan.after.macs / plan.before.macs)
    assert rankfold.accuracy(rankfold.factorize(model, cheaper), labelled) < 0.9


@pytest.mark.parametrize("max_drop", [-0.1, float("nan")])
def test_a_drop_that_makes_no_sense_is_refused(analysis, max_drop) -> None:
    with pytest.raises(BudgetError, match="must not be negative"):
        cheapest_within(
            make_model(), make_labelled(), rankfold.accuracy, max_drop, lambda b: analysis.plan()
        )


def test_agreement_with_the_teacher() -> None:
    teacher, data = make_model(), make_data()[:2]
    agreement = teacher_agreement(teacher)
    assert agreement(teacher, data) == 1
    other = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    assert 0 <= agreement(other, data) < 0.9


def test_compress_by_latency_and_by_drop(monkeypatch) -> None:
    model, data = make_model(), make_data()
    small = rankfold.compress(model, data, max_drop=0.2, epochs=0, loss_metric="weight")
    record = rankfold.record_of(small)
    assert record.plan.after.macs < record.plan.before.macs
    with pytest.raises(BudgetError, match="not for both"):
        rankfold.compress(model, data, max_drop=0.2, macs=0.5)
    with pytest.raises(BudgetError, match=r"loses at most 0\.01 of the metric"):
        rankfold.compress(model, data, epochs=0, loss_metric="weight")
    monkeypatch.setattr(sys.modules["rankfold.compress"], "UNASKED_DROP", 0.2)
    unasked = rankfold.compress(model, data, epochs=0, loss_metric="weight")
    assert rankfold.record_of(unasked).plan == record.plan
    small = rankfold.compress(model, data, latency=0.99, epochs=0, loss_metric="weight")
    record = rankfold.record_of(small)
    assert set(record.plan.request) == {"latency"} and record.comparison is not None


def methods_of(plan: rankfold.Plan) -> set[str | None]:
    return {entry.method for entry in plan.factorized}


def offered(analysis: Analysis) -> list[set[str]]:
    return [{candidate.method for candidate in layer.candidates} for layer in analysis.layers]


def test_contenders_give_each_method_the_layers_that_it_takes_or_none(analysis) -> None:
    found = contenders(analysis)
    # One layer alone takes tucker2.
    assert list(found) == ["all", "separable", "svd", "all but separable", "all but svd"]
    assert found["all"] is analysis
    everything = offered(analysis)
    for name in ("separable", "svd"):
        assert offered(found[name]) == [
            {name} if name in methods else methods for methods in everything
        ]
        assert offered(found[f"all but {name}"]) == [methods - {name} for methods in everything]


def test_contenders_that_come_to_the_same_are_one(analysis) -> None:
    fewer = analysis.without("tucker2")
    assert not any("tucker2" in methods for methods in offered(fewer))
    for before, after in zip(analysis.layers, analysis.without("svd").layers, strict=True):
        lost_all = {candidate.method for candidate in before.candidates} == {"svd"}
        left_out = "svd alone takes it, which is left out"
        assert after.reason == (left_out if lost_all else before.reason)
    found = contenders(fewer)
    # svd takes what separable takes, so that svd wherever it can be is all but separable.
    assert offered(fewer.preferring("svd")) == offered(fewer.without("separable"))
    assert list(found) == ["all", "separable", "svd", "all but svd"]


def test_of_contenders_the_one_with_the_best_metric_wins(analysis) -> None:
    model, data = make_model(), make_data()
    tried: list[set[str | None]] = []

    def planned(source):
        plan = source.plan(macs=0.5)
        tried.append(methods_of(plan))
        return plan, rankfold.factorize(model, plan)

    def likes_separable(network, data) -> float:
        return float("separable" in methods_of(rankfold.record_of(network).plan))

    attempts = [partial(planned, source) for source in contenders(analysis).values()]
    plan, small = winner(attempts, likes_separable, data)
    assert len(tried) == 5 and "separable" in methods_of(plan)
    assert rankfold.record_of(small).plan == plan
    # Of equals the first, and what does nothing only if nothing else can be done.
    first, _ = winner(attempts, lambda network, data: 1.0, data)
    assert methods_of(first) == tried[0]
    dense = analysis.plan(macs=1.0)
    dense_first = [
        lambda plan=plan: (plan, rankfold.factorize(model, plan)) for plan in (dense, first)
    ]

    def likes_dense(network, data) -> float:
        return -float(len(rankfold.record_of(network).plan.factorized))

    assert winner(dense_first, likes_dense, data)[0] is first

    def out_of_reach():
        raise BudgetError("out of reach")

    with pytest.raises(BudgetError, match="out of reach"):
        winner([out_of_reach] * 2, likes_dense, data)


def test_compress_with_a_contest() -> None:
    model, data = make_model(), make_data()
    judged: list[float] = []

    def metric(network, batches) -> float:
        judged.append(accuracy(network, batches))
        return judged[-1]

    options = {"epochs": 0, "loss_metric": "weight", "metric": metric, "test": make_labelled()}
    small = rankfold.compress(model, data, macs=0.5, contest=True, **options)
    record = rankfold.record_of(small)
    assert record.plan.after.macs <= 0.5 * record.plan.before.macs
    assert record.comparison is not None and record.comparison.after.metric == max(judged[1:6])
    rankfold.compress(model, data, params=0.5, contest=True, epochs=0, loss_metric="weight")
    for wrong in ({"max_drop": 0.1}, {"energy": 0.9}, {}):
        with pytest.raises(BudgetError, match="contest is between plans of one budget"):
            rankfold.compress(model, data, contest=True, **wrong)


def test_a_contest_for_a_latency_also_has_a_plan_by_macs(monkeypatch) -> None:
    model, data = make_model(), make_data()
    untimed = rankfold.analyze(model, data, metric="weight")
    made: list[rankfold.Plan] = []
    competing: list[int] = []

    def to_latency(model, source, latency, batch, make_plan, **settings):
        made.append(make_plan(0.5))
        return search.TimedPlan(made[0], rankfold.factorize(model, made[0]), latency)

    def last(attempts, *judging):
        competing.append(len(attempts))
        return attempts[-1]()

    module = sys.modules["rankfold.compress"]
    monkeypatch.setattr(module, "analyze", lambda *args, **settings: untimed)
    monkeypatch.setattr(module, "plan_to_latency", to_latency)
    monkeypatch.setattr(module, "winner", last)
    rankfold.compress(model, data, latency=0.6, contest=True, epochs=0)
    assert made[0].layers == untimed.plan(macs=0.5).layers and not made[0].request
    # MACs that were asked for stay what was asked for.
    with pytest.raises(BudgetError, match="timed"):
        rankfold.compress(model, data, latency=0.6, macs=0.9, contest=True, epochs=0)
    assert competing == [len(contenders(untimed)) + 1, len(contenders(untimed))]


class SmallTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.out = nn.Embedding(40, 32), nn.Linear(32, 40)
        self.out.weight = self.table.weight
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.eval()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.table(ids)
        return self.out(hidden + self.attention(hidden, hidden, hidden)[0])


def test_projections_and_shared_weights_are_put_back_too(monkeypatch) -> None:
    clock(monkeypatch, lambda count: 1.0)
    model, ids = SmallTransformer(), torch.randint(40, (2, 5))
    plan = rankfold.analyze(model, [ids], metric="weight").plan(fraction=0.25)
    entries = tuple(
        replace(
            entry,
            before=replace(entry.before, latency_ms=1.0),
            after=replace(entry.after, latency_ms=0.9),
        )
        for entry in plan.layers
    )
    plan = replace(plan, layers=entries)
    assert {entry.name for entry in plan.factorized} == {
        "table",
        *(f"attention.{name}_proj" for name in ("q", "k", "v", "out")),
    }
    timed = search.TimedPlan(plan, rankfold.factorize(model, plan), 0.9)
    timing = NetworkTiming(1.0, 0.0, "contiguous", "cpu", 1)
    found = search._put_back(model, timed, ids, run, timing, silent)
    assert not found.plan.factorized
    assert torch.equal(found.model(ids), model(ids))
    assert found.model.out.weight is found.model.table.weight
