import pytest
import torch
from networks import make_data, make_model, make_perceptron, make_vectors
from torch import nn

import rankfold
from rankfold.batches import all_finite
from rankfold.cost import count_macs, count_parameters
from rankfold.errors import BudgetError, RankfoldError, UnsupportedLayerError
from rankfold.methods import DEFAULT_METHODS, LowRank, SeparableBasis


@pytest.fixture(scope="module")
def analysis() -> rankfold.Analysis:
    return rankfold.analyze(make_model(), make_data())


@pytest.mark.parametrize(
    "budget", [{"macs": 0.5}, {"params": 0.4}, {"params": 0.5, "macs": 0.4}, {"macs": 0.9}]
)
def test_plan_keeps_its_budget_and_tells_the_true_cost(analysis, budget) -> None:
    plan = analysis.plan(**budget)
    small = rankfold.factorize(make_model(), plan)
    batch = make_data()[0]
    assert plan.after.parameters == count_parameters(small)
    assert plan.after.macs == count_macs(lambda: small(batch)) / len(batch)
    assert plan.after.parameters <= budget.get("params", 1) * plan.before.parameters
    assert plan.after.macs <= budget.get("macs", 1) * plan.before.macs


class TwoHeads(nn.Module):
    """Of outputs in units that have nothing to do with each other."""

    def __init__(self, unit: float) -> None:
        super().__init__()
        self.trunk = make_perceptron()[:-1]
        self.heads = nn.ModuleList(nn.Linear(48, 32) for _ in range(2))
        self.unit = unit

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.trunk(x)
        return self.heads[0](hidden), self.unit * self.heads[1](hidden)


def test_the_unit_of_an_output_does_not_matter() -> None:
    """Of a network with two: the one of small numbers would else be given up first."""
    model = TwoHeads(1.0).eval()
    other = TwoHeads(256.0).eval()
    other.load_state_dict(model.state_dict())
    one, scaled = (rankfold.analyze(m, make_vectors(), outputs="values") for m in (model, other))
    for budget in (0.6, 0.75, 0.9):
        first, second = one.plan(macs=budget), scaled.plan(macs=budget)
        assert [(e.method, e.rank) for e in first.layers] == [
            (e.method, e.rank) for e in second.layers
        ]
        assert first.loss == pytest.approx(second.loss, rel=1e-6)


def test_more_budget_never_means_more_loss(analysis) -> None:
    losses = [analysis.plan(macs=macs).loss for macs in (0.3, 0.4, 0.6, 0.8, 1)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0


def test_absolute_budgets_are_counts_of_one_sample(analysis) -> None:
    macs = analysis.plan(macs=0.5).before.macs
    assert analysis.plan(macs=macs // 2).after == analysis.plan(macs=0.5).after


def test_smallest_budget_offered_can_be_reached(analysis) -> None:
    for name in ("macs", "params"):
        with pytest.raises(BudgetError, match="smallest that can be reached") as caught:
            analysis.plan(**{name: 0.001})
        smallest = caught.value.smallest[name]
        analysis.plan(**{name: smallest})
        with pytest.raises(BudgetError):
            analysis.plan(**{name: smallest - 0.0002})


def test_budgets_that_contradict_each_other_are_named() -> None:
    # Two convolutions of equal weights: the cheap one in MACs holds the parameters.
    model = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    analysis = rankfold.analyze(model, [torch.randn(1, 32, 8, 8)])
    with pytest.raises(BudgetError, match="params cannot"):
        analysis.plan(params=1e-6, macs=1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"macs": 0},
        {"macs": -0.5},
        {"energy": 0},
        {"energy": 1.5},
        {"fraction": -1},
        {"macs": 0.5, "evbmf": True},
        {"energy": 0.9, "fraction": 0.5},
        {"macs": float("nan")},
        {"macs": float("inf")},
    ],
)
def test_senseless_budgets_are_refused(analysis, wrong) -> None:
    with pytest.raises(BudgetError):
        analysis.plan(**wrong)


def test_rules_keep_layers_dense_beyond_break_even(analysis) -> None:
    plan = analysis.plan(energy=1.0)
    assert not plan.factorized
    assert all("break-even" in e.reason for e in plan.layers if e.name in ("body", "head"))
    for rule in ({"fraction": 0.25}, {"energy": 0.5}, {"evbmf": True}, {}):
        plan = analysis.plan(**rule)
        assert plan.factorized
        for entry in plan.factorized:
            assert entry.after.parameters <= entry.before.parameters
            assert entry.after.macs <= entry.before.macs


def test_a_rank_that_costs_exactly_as_much_is_beyond_break_even() -> None:
    methods = [LowRank()]
    analysis = rankfold.analyze(nn.Linear(16, 16), [torch.randn(2, 16)], methods=methods)
    assert 8 * (16 + 16) == 16 * 16 and not analysis.layers[0].candidates
    analysis = rankfold.analyze(nn.Linear(24, 24), [torch.randn(2, 24)], methods=methods)
    assert [candidate.rank for candidate in analysis.layers[0].candidates] == [(8,)]


def test_fraction_rule_takes_that_fraction_of_full_rank(analysis) -> None:
    ranks = {entry.name: entry.rank for entry in analysis.plan(fraction=0.25).factorized}
    assert ranks["body"] == (16, 8)  # 12 of 48, rounded up; 8 of 32
    assert ranks["head"] == (16,)


def test_reasons_name_what_cannot_be_factorized(analysis) -> None:
    reasons = {layer.name: layer.reason for layer in analysis.layers}
    assert "groups=48: depthwise" in reasons["depthwise"]
    assert reasons["body"] is None


def test_only_the_layers_asked_for() -> None:
    plan = rankfold.analyze(make_model(), make_data(), layers=["head", "bo*"]).plan(fraction=0.2)
    assert {entry.name for entry in plan.factorized} == {"head", "body"}
    plan = rankfold.analyze(make_model(), make_data(), methods=[LowRank()]).plan(fraction=0.2)
    assert {entry.method for entry in plan.factorized} == {"svd"}


def test_methods_are_the_default_ones_or_those_asked_for() -> None:
    def tried(**options) -> set[str]:
        found = rankfold.analyze(make_model(), make_data()[:1], metric="weight", **options)
        return {candidate.method for layer in found.layers for candidate in layer.candidates}

    default = tried()
    assert {"tucker2", "svd"} < default <= set(DEFAULT_METHODS)
    assert tried(methods=["cp", SeparableBasis(shared=True)]) == {"cp", "separable-basis"}
    assert default < tried(methods="all", layers=["body"])
    with pytest.raises(RankfoldError, match="no method 'taste'"):
        tried(methods="taste")


def test_a_layer_asked_for_by_name_must_be_possible() -> None:
    with pytest.raises(UnsupportedLayerError, match=r"'depthwise'.*groups=48"):
        rankfold.analyze(make_model(), make_data(), layers=["depthwise"])
    with pytest.raises(UnsupportedLayerError, match=r"'nowhere'.*body"):
        rankfold.analyze(make_model(), make_data(), layers=["nowhere"])
    with pytest.raises(RankfoldError, match="no metric"):
        rankfold.analyze(make_model(), make_data(), metric="taste")


def test_the_same_network_gives_the_same_plan(analysis) -> None:
    again = rankfold.analyze(make_model(), make_data())
    assert again.plan(macs=0.4) == analysis.plan(macs=0.4)


def test_in_a_deep_network_not_every_layer_is_checked() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(24, 24) for _ in range(10)))
    data = [torch.randn(64, 24) for _ in range(2)]
    checked = rankfold.analyze(model, data, metric="fisher", outputs="values")
    # One batch that went forward and backward allows for four times as many checks.
    assert len(checked.checks) == 8
    alone = rankfold.analyze(model, data, metric="fisher", outputs="values", check=False)
    assert not alone.checks
    layers = {check.layer for check in checked.checks}
    factors = {
        after.loss / before.loss
        for ours, theirs in zip(checked.layers, alone.layers, strict=True)
        for after, before in zip(ours.candidates, theirs.candidates, strict=True)
        if ours.name not in layers
    }
    ratios = [check.measured / check.predicted for check in checked.checks]
    assert len(layers) < 10
    assert min(factors) == pytest.approx(max(factors))
    assert min(ratios) <= min(factors) <= max(ratios)


class Nested(nn.Module):
    """A network whose outputs lie in a dictionary, with one layer that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = make_model()
        self.unused = nn.Linear(64, 64)

    def forward(self, images: torch.Tensor) -> dict[str, tuple[torch.Tensor, ...]]:
        scores = self.inner(images)
        return {"scores": (scores, scores.sum(-1))}


def with_dead_units() -> nn.Module:
    model = make_model()
    with torch.no_grad():
        model.out.weight[:, :40] = 0  # nothing reads these outputs of the head
        model.body.bias.fill_(-100)  # and the body's never pass the depthwise layer's ReLU
        model.depthwise.bias.fill_(-100)
    return model


ALIKE = [torch.ones_like(batch) for batch in make_data()]
HALF = [batch.bfloat16() for batch in make_data()]


@pytest.mark.parametrize("metric", ["auto", "fisher", "response", "weight"])
@pytest.mark.parametrize(
    ("model", "data"),
    [
        pytest.param(make_model(), make_data()[:1], id="one batch"),
        pytest.param(make_model(), [make_data()[0][:1]], id="one sample"),
        pytest.param(make_model(), ALIKE, id="constant inputs"),
        pytest.param(with_dead_units(), make_data(), id="dead units"),
        pytest.param(Nested(), make_data(), id="nested outputs and a layer never called"),
        pytest.param(make_model().train(), make_data(), id="train mode"),
        pytest.param(make_model().bfloat16(), HALF, id="half precision"),
    ],
)
def test_poor_data_and_odd_networks_are_planned_all_the_same(model, data, metric) -> None:
    training = model.training
    analysis = rankfold.analyze(model, data, metric=metric)
    assert model.training == training
    losses = [candidate.loss for layer in analysis.layers for candidate in layer.candidates]
    assert losses and all(0 <= loss < float("inf") for loss in losses)
    plan = analysis.plan(macs=0.5)
    assert plan.factorized and plan.after.macs <= 0.5 * plan.before.macs
    small = rankfold.factorize(model, plan).eval()
    with torch.no_grad():
        assert all_finite(small(data[0]))
    (unused,) = [one.reason for one in analysis.layers if one.name == "unused"] or [None]
    assert unused == ("the forward pass never calls it" if isinstance(model, Nested) else None)
