from dataclasses import replace

import numpy as np
import pytest
from networks import make_data, make_model

import rankfold
from rankfold.analysis.candidates import AnalysedLayer
from rankfold.analysis.latency import LayerTiming
from rankfold.analysis.overrides import Overrides
from rankfold.analysis.planning import Limit, choose_within_budget
from rankfold.cost import count_parameters
from rankfold.errors import BudgetError, PlanError
from rankfold.methods import LowRank, Tucker2
from rankfold.plan import LayerPlan


@pytest.fixture(scope="module")
def analysis() -> rankfold.Analysis:
    """Of two methods, so that a new one does not change what is chosen without overrides."""
    methods = [Tucker2(), LowRank()]
    return rankfold.analyze(make_model(), make_data()[:1], metric="weight", methods=methods)


def entries(plan: rankfold.Plan) -> dict[str, LayerPlan]:
    return {entry.name: entry for entry in plan.layers}


def ranks(plan: rankfold.Plan) -> dict[str, tuple[int, ...]]:
    return {entry.name: entry.rank for entry in plan.factorized}


def test_without_overrides_nothing_changes(analysis) -> None:
    assert Overrides().apply(analysis.layers) == list(analysis.layers)
    assert analysis.plan(macs=0.4, overrides=Overrides()) == analysis.plan(macs=0.4)


@pytest.mark.parametrize("request_", [{"macs": 0.8}, {"fraction": 0.25}, {}])
def test_layers_to_keep_stay_dense(analysis, request_) -> None:
    assert "body" in ranks(analysis.plan(**request_))
    plan = analysis.plan(**request_, overrides=Overrides(keep=["bo*"]))
    assert "body" not in ranks(plan)
    assert entries(plan)["body"].reason == "kept dense, as asked"
    assert "groups=48: depthwise" in entries(plan)["depthwise"].reason
    assert plan.after.macs <= request_.get("macs", 1) * plan.before.macs


def test_keeping_all_leaves_the_network_as_it_is(analysis) -> None:
    plan = analysis.plan(macs=1, overrides=Overrides(keep=["*"]))
    assert not plan.factorized and plan.after == plan.before
    with pytest.raises(BudgetError) as caught:
        analysis.plan(macs=0.9, overrides=Overrides(keep=["*"]))
    assert caught.value.smallest["macs"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("method", ["svd", "tucker2"])
@pytest.mark.parametrize(
    "request_", [{"macs": 1}, {"params": 0.9}, {"macs": 1, "objective": "max"}]
)
def test_a_forced_layer_has_the_method_where_the_budget_would_leave_it(
    analysis, method, request_
) -> None:
    plan = analysis.plan(**request_, overrides=Overrides(force={"body": method}))
    assert entries(plan)["body"].method == method
    small = rankfold.factorize(make_model(), plan)
    assert plan.after.parameters == count_parameters(small) < plan.before.parameters


def test_a_forced_layer_keeps_what_it_can(analysis) -> None:
    """With all budget in the world, the candidate of the least loss."""
    for method in ("svd", "tucker2"):
        plan = analysis.plan(macs=1, overrides=Overrides(force={"body": method}))
        layer = next(layer for layer in analysis.layers if layer.name == "body")
        least = min(c.loss for c in layer.candidates if c.method == method)
        assert entries(plan)["body"].loss == least == plan.loss


def test_a_pattern_forces_all_its_layers(analysis) -> None:
    plan = analysis.plan(macs=1, overrides=Overrides(force={"head": "svd", "[os]*": "svd"}))
    assert set(ranks(plan)) == {"stem", "head", "out"}


@pytest.mark.parametrize("rule", [{"fraction": 0.25}, {"energy": 0.3}])
def test_rules_keep_to_the_method_that_is_forced(analysis, rule) -> None:
    assert entries(analysis.plan(**rule))["body"].method == "tucker2"
    plan = analysis.plan(**rule, overrides=Overrides(force={"body": "svd"}))
    assert entries(plan)["body"].method == "svd"


def test_a_rule_beyond_break_even_does_not_leave_a_forced_layer_dense(analysis) -> None:
    assert entries(analysis.plan(energy=1.0))["head"].method is None
    plan = analysis.plan(energy=1.0, overrides=Overrides(force={"head": "svd"}))
    assert entries(plan)["head"].method == "svd"


@pytest.mark.parametrize("bound", [{"greatest_rank": {"body": 8}}, {"least_rank": {"body": 16}}])
def test_rules_keep_to_the_ranks_that_are_allowed(analysis, bound) -> None:
    assert ranks(analysis.plan(fraction=0.25))["body"] == (16, 8)
    plan = analysis.plan(fraction=0.25, overrides=Overrides(**bound))
    assert entries(plan)["body"].rank == ((8, 8) if "greatest_rank" in bound else (16, 16))


def test_ranks_stay_within_the_bounds(analysis) -> None:
    bounded = Overrides(least_rank={"body": 16, "he*": 24}, greatest_rank={"body": 24, "head": 40})
    for macs in (0.45, 0.6, 0.8):
        found = ranks(analysis.plan(macs=macs, overrides=bounded))
        assert all(16 <= entry <= 24 for entry in found["body"])
        assert all(24 <= entry <= 40 for entry in found.get("head", ()))
    free = ranks(analysis.plan(macs=0.45))
    assert min(free["body"]) < 16 and max(free["head"]) > 40


def test_of_several_bounds_the_narrowest_counts(analysis) -> None:
    bounded = Overrides(
        force={"body": "tucker2"},
        least_rank={"*": 8, "body": 16},
        greatest_rank={"*": 64, "b*": 24, "body": 32},
    )
    (body,) = (layer for layer in bounded.apply(analysis.layers) if layer.name == "body")
    assert {candidate.rank for candidate in body.candidates} == {
        (a, b) for a in (16, 24) for b in (16, 24)
    }


def test_bounds_of_one_rank_settle_it(analysis) -> None:
    settled = Overrides(force={"head": "svd"}, least_rank={"head": 24}, greatest_rank={"head": 24})
    assert ranks(analysis.plan(macs=0.9, overrides=settled))["head"] == (24,)


def test_a_layer_without_an_allowed_rank_stays_dense(analysis) -> None:
    plan = analysis.plan(params=0.9, overrides=Overrides(least_rank={"body": 1000}))
    assert "body" not in ranks(plan) and plan.factorized


def test_overrides_leave_the_analysis_alone(analysis) -> None:
    before = [layer.candidates for layer in analysis.layers]
    analysis.plan(macs=0.9, overrides=Overrides(keep=["body"], greatest_rank={"head": 8}))
    assert [layer.candidates for layer in analysis.layers] == before
    assert "body" in ranks(analysis.plan(macs=0.4))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (Overrides(keep=["body"], force={"bo*": "svd"}), "'body' is both .* kept dense and forced"),
        (Overrides(force={"body": "svd", "*y": "tucker2"}), "'body' is forced to svd and tucker2"),
        (
            Overrides(least_rank={"head": 32}, greatest_rank={"*": 16}),
            "'head': no rank is at least 32 and at most 16",
        ),
        (Overrides(greatest_rank={"head": 0}), "'head': no rank is .* at most 0"),
        (Overrides(force={"head": "tucker2"}), "'head' cannot be forced to tucker2"),
        (Overrides(force={"head": "magic"}), "'head' cannot be forced to magic"),
        (Overrides(force={"depthwise": "svd"}), "'depthwise' .* svd: grouped convolution"),
        (
            Overrides(force={"body": "svd"}, least_rank={"body": 1000}),
            "'body' cannot be forced to svd: no rank below break-even",
        ),
        (Overrides(keep=["nowhere"]), "no layer matches 'nowhere'"),
        (Overrides(force={"nowhere": "svd"}), "no layer matches 'nowhere'"),
        (Overrides(least_rank={"Body": 8}), "no layer matches 'Body'"),
        (Overrides(greatest_rank={"body.*": 8}), r"no layer matches 'body\.\*'"),
    ],
)
def test_what_contradicts_itself_is_refused(analysis, overrides, message) -> None:
    for request_ in ({"macs": 0.9}, {"fraction": 0.25}):
        with pytest.raises(PlanError, match=message):
            analysis.plan(**request_, overrides=overrides)


def test_a_budget_below_what_is_forced_names_the_smallest(analysis) -> None:
    forced = Overrides(force={"head": "svd"}, least_rank={"head": 56})
    with pytest.raises(BudgetError, match="smallest that can be reached") as caught:
        analysis.plan(params=0.01, overrides=forced)
    plan = analysis.plan(params=caught.value.smallest["params"], overrides=forced)
    assert ranks(plan)["head"] == (56,)


def timed(layer: AnalysedLayer, milliseconds: float) -> AnalysedLayer:
    """A layer whose dense form takes 1 ms, and all others so many."""
    tables = {
        key: np.full([len(entry) for entry in grid], milliseconds)
        for key, grid in layer.grids.items()
    }
    return replace(layer, timing=LayerTiming(1.0, layer.grids, tables))


def test_with_a_budget_of_latency_a_forced_layer_is_factorized_where_it_is_faster(analysis) -> None:
    layers = [timed(layer, 0.5) for layer in analysis.layers if layer.name == "head"]
    limits = {"latency": Limit(10.0, 1.0, 0.0)}
    assert choose_within_budget(layers, limits) == [None]
    (choice,) = choose_within_budget(layers, limits, forced={"head"})
    assert choice.method == "svd"


def test_with_a_budget_of_latency_a_forced_layer_is_never_left_dense(analysis) -> None:
    layers = [timed(layer, 1.5) for layer in analysis.layers if layer.name == "head"]
    (choice,) = choose_within_budget(layers, {"latency": Limit(10.0, 1.0, 0.0)}, forced={"head"})
    assert choice is not None
