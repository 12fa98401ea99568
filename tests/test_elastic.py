import json
import time

import pytest
import torch
from networks import SmallConvolutional, make_data, make_model
from torch import nn

import rankfold
from rankfold.checkpoint import PLAN
from rankfold.cost import count_macs, count_parameters
from rankfold.elastic import _changing_ranks, restricted, steps_down_to
from rankfold.errors import BudgetError, CheckpointError, PlanError
from rankfold.layers import factors_of
from rankfold.measure import output_error
from rankfold.record import record_of


@pytest.fixture(scope="module")
def analysis() -> rankfold.Analysis:
    return rankfold.analyze(make_model(), make_data())


def trained(analysis: rankfold.Analysis, **options) -> nn.Module:
    small = rankfold.factorize(make_model(), analysis.plan(macs=0.7))
    budgets = [{"macs": 0.5}, {"macs": 0.4}]
    rankfold.recover_elastic(
        small,
        analysis,
        make_data(),
        teacher=make_model(),
        budgets=budgets,
        **{"epochs": 3, "learning_rate": 5e-4, **options},
    )
    return small


@pytest.fixture(scope="module")
def elastic(analysis) -> nn.Module:
    return trained(analysis)


def error(model: nn.Module) -> float:
    batch = torch.cat(make_data())
    with torch.no_grad():
        return output_error(make_model()(batch), model.eval()(batch))


@pytest.mark.parametrize("macs", [0.7, 0.55, 0.45, 0.4])
def test_a_slice_keeps_its_budget_and_says_what_it_costs(elastic, macs) -> None:
    before = {name: value.clone() for name, value in elastic.state_dict().items()}
    small = rankfold.slice_to(elastic, macs=macs)
    plan = record_of(small).plan
    assert plan.after.macs <= macs * plan.before.macs and plan.request == {"macs": macs}
    batch = make_data()[0]
    assert count_macs(lambda: small(batch)) == len(batch) * plan.after.macs
    assert count_parameters(small) == plan.after.parameters
    for entry in plan.factorized:
        assert repr(small.get_submodule(entry.name).to_dense()) == entry.layer
    assert all(torch.equal(value, before[name]) for name, value in elastic.state_dict().items())
    shared = {id(one) for one in small.parameters()} & {id(one) for one in elastic.parameters()}
    assert not shared


def test_a_slice_is_what_was_trained_at_its_ranks(elastic) -> None:
    """The masked network and the sliced one do the same."""
    batch = make_data()[0]
    small = rankfold.slice_to(elastic, macs=0.4)
    ranks = {entry.name: entry.rank for entry in record_of(small).plan.factorized}
    with torch.no_grad(), _changing_ranks(elastic) as layers:
        assert layers
        for name, layer in layers.items():
            layer.set_rank(ranks[name])
        masked = elastic.eval()(batch)
    with torch.no_grad():
        torch.testing.assert_close(small(batch), masked)
        # And afterwards everything is as it was.
        assert error(elastic) < error(small)


def test_slices_lose_less_than_those_of_a_network_recovered_at_full_rank_alone(analysis) -> None:
    options = {"epochs": 8, "learning_rate": 5e-4, "patience": 9}
    elastic = trained(analysis, **options)
    plain = rankfold.factorize(make_model(), analysis.plan(macs=0.7))
    rankfold.recover(plain, make_data(), teacher=make_model(), **options)
    choices = restricted(analysis, plain)
    rankfold.record.attach_record(
        plain, rankfold.Record(record_of(plain).plan, "", elastic=choices)
    )
    assert error(rankfold.slice_to(elastic, macs=0.4)) < error(rankfold.slice_to(plain, macs=0.4))


def test_it_is_saved_loaded_and_sliced_again(elastic, tmp_path) -> None:
    rankfold.save(elastic, tmp_path / "elastic")
    loaded = rankfold.load(tmp_path / "elastic", make_model)
    ours, theirs = (rankfold.slice_to(one, macs=0.5) for one in (elastic, loaded))
    assert record_of(ours).plan == record_of(theirs).plan
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name])
    rankfold.save(ours, tmp_path / "slice")
    batch = make_data()[0]
    with torch.no_grad():
        again = rankfold.load(tmp_path / "slice", make_model)
        assert torch.equal(again(batch), ours.eval()(batch))
    # A slice can be sliced further.
    smaller = rankfold.slice_to(again, macs=0.4)
    plan = record_of(smaller).plan
    assert plan.after.macs <= 0.4 * plan.before.macs
    # And does not grow again.
    assert record_of(rankfold.slice_to(smaller, macs=0.6)).plan.after.macs <= (
        record_of(smaller).plan.after.macs
    )


@pytest.mark.parametrize(
    "damage",
    [
        lambda elastic: elastic.update(layers=3),
        lambda elastic: elastic.pop("metric"),
        lambda elastic: elastic.update(tensors={"0.svd.ranks": "no"}),
        lambda elastic: elastic.update(format_version=99),
    ],
)
def test_a_damaged_record_is_refused(elastic, tmp_path, damage) -> None:
    rankfold.save(elastic, tmp_path / "elastic")
    path = tmp_path / "elastic" / PLAN
    document = json.loads(path.read_text())
    damage(document["elastic"])
    path.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"elastic|analysis"):
        rankfold.load(tmp_path / "elastic", make_model)


def test_ranks_above_those_of_the_model_are_refused(elastic, tmp_path) -> None:
    """A record from elsewhere may say anything."""
    rankfold.save(elastic, tmp_path / "elastic")
    path = tmp_path / "elastic" / PLAN
    document = json.loads(path.read_text())
    for name, value in document["elastic"]["tensors"].items():
        if name.endswith(".ranks"):
            document["elastic"]["tensors"][name] = [[n + 1000 for n in rank] for rank in value]
    path.write_text(json.dumps(document))
    loaded = rankfold.load(tmp_path / "elastic", make_model)
    with pytest.raises(PlanError, match="cannot be sliced to rank"):
        rankfold.slice_to(loaded, macs=0.5)


def test_training_is_resumed_and_the_same_by_seed(analysis, tmp_path) -> None:
    states = [trained(analysis, seed=seed).state_dict() for seed in (1, 1, 2)]
    names = list(states[0])
    assert all(torch.equal(states[0][name], states[1][name]) for name in names)
    assert any(not torch.equal(states[0][name], states[2][name]) for name in names)
    state = tmp_path / "state.pt"
    trained(analysis, seed=1, checkpoint=state)
    resumed = trained(analysis, seed=1, checkpoint=state).state_dict()  # nothing is left to do
    assert all(torch.equal(states[0][name], resumed[name]) for name in names)


def test_frozen_factors_and_modes_are_kept(elastic) -> None:
    first = record_of(elastic).plan.factorized[0].name
    frozen = rankfold.slice_to(elastic, macs=0.7)
    factors_of(frozen.get_submodule(first))[0].weight.requires_grad_(False)
    small = rankfold.slice_to(frozen.train(), macs=0.4)
    flags = [factor.weight.requires_grad for factor in factors_of(small.get_submodule(first))]
    assert flags == [False, *[True] * (len(flags) - 1)]
    assert all(module.training for module in small.modules())


def test_what_cannot_be_sliced_is_refused(analysis, elastic) -> None:
    plain = rankfold.factorize(make_model(), analysis.plan(macs=0.7))
    with pytest.raises(PlanError, match="not trained to be sliced"):
        rankfold.slice_to(plain, macs=0.5)
    with pytest.raises(BudgetError):
        rankfold.slice_to(elastic, macs=1e-3)
    other = rankfold.analyze(nn.Sequential(nn.Linear(32, 32)), [torch.randn(8, 32)] * 3)
    with pytest.raises(PlanError, match="not the one"):
        restricted(other, plain)
    dense = rankfold.factorize(make_model(), analysis.plan(macs=1.0))
    with pytest.raises(PlanError, match="no layer of the model"):
        restricted(analysis, dense)


def test_budgets_between_are_named() -> None:
    found = steps_down_to(0.1, {"macs": 0.8})
    assert [budget["macs"] for budget in found] == pytest.approx([0.4, 0.2, 0.1])
    for smallest, budget in ((0.9, {"macs": 0.8}), (0.1, {}), (0.1, {"macs": 0.5, "params": 0.5})):
        with pytest.raises(BudgetError):
            steps_down_to(smallest, budget)


def test_grouped_layers_keep_their_rank() -> None:
    class Grouped(SmallConvolutional):
        def __init__(self) -> None:
            super().__init__()
            self.depthwise = nn.Conv2d(48, 48, 3, padding=1, groups=2)

    torch.manual_seed(0)
    model, data = Grouped().eval(), make_data()
    analysis = rankfold.analyze(model, data)
    small = rankfold.factorize(model, analysis.plan(macs=0.5))
    choices = {layer.name: layer for layer in restricted(analysis, small).layers}
    ranks = {entry.name: entry.rank for entry in record_of(small).plan.factorized}
    assert "depthwise" in ranks
    assert [one.rank for one in choices["depthwise"].candidates] == [ranks["depthwise"]]


def test_slicing_takes_no_time_to_speak_of(elastic) -> None:
    """No data, no decomposition: the model is not even run."""
    calls = []
    hook = elastic.register_forward_hook(lambda *_: calls.append(time.time()))
    rankfold.slice_to(elastic, macs=0.5)
    hook.remove()
    assert not calls
