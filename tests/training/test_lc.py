"""Ranks learned with the weights."""

import contextlib
import copy
import itertools

import numpy as np
import pytest
import torch
from networks import make_data, make_labelled, make_model
from tensors import tensor_of, weight_of
from torch import nn

import rankfold
from rankfold.analysis import Overrides
from rankfold.errors import BudgetError, JournalError, PlanError, RankfoldError
from rankfold.methods import METHODS, Moments
from rankfold.training import learn_ranks
from rankfold.training.lc import _scale

cross_entropy = nn.functional.cross_entropy


def regression(seed: int = 0):
    """A linear layer, and batches whose inputs differ in scale: what to fit, and with what."""
    torch.manual_seed(seed)
    scales = torch.logspace(0, -1.5, 12)
    target = nn.Linear(12, 10, bias=False)
    with torch.no_grad():
        target.weight.copy_(tensor_of((10, 12), torch.float32, seed))
    inputs = torch.randn(256, 12) * scales
    outputs = target(inputs).detach()
    return target, [(inputs, outputs)]


def best_of_rank(data, rank: int) -> float:
    """The least mean squared error of a linear map of a rank (reduced rank regression)."""
    ((_, outputs),) = data  # without noise all of them are in the range of the inputs
    values = torch.linalg.svdvals(outputs)
    return (values[rank:].square().sum() / outputs.numel()).item()


def error(model: nn.Module, data) -> float:
    ((inputs, outputs),) = data
    with torch.no_grad():
        return (model(inputs) - outputs).square().mean().item()


@pytest.mark.parametrize("multipliers", [True, False])
@pytest.mark.parametrize(("loss_metric", "off"), [("weight", 1.7), ("response", 1.15)])
def test_it_comes_near_reduced_rank_regression(multipliers, loss_metric, off) -> None:
    """The least error that there is. The SVD of the weights wastes ranks on what hardly varies."""
    target, data = regression()
    svd = METHODS["svd"](alignment=1)
    params = 4 * 22 / 120
    learned = learn_ranks(
        target,
        data,
        params=params,
        loss_fn=nn.functional.mse_loss,
        methods=[svd],
        loss_metric=loss_metric,
        rounds=10,
        epochs=30,
        learning_rate=1.5e-2,
        stiffness=0.1,
        multipliers=multipliers,
    )
    assert learned.rounds[-1].ranks == {"": (4,)}
    analysis = rankfold.analyze(target, data, methods=[svd], metric="weight")
    direct = rankfold.factorize(target, analysis.plan(params=params))
    best = best_of_rank(data, 4)
    assert best <= error(learned.model, data) < off * best < 0.5 * error(direct, data)


def test_multipliers_close_the_gap_that_a_penalty_leaves() -> None:
    """Where μ does not grow, as it has to without them."""
    target, data = regression()
    gaps = [
        learn_ranks(
            target,
            data * 5,
            params=4 * 22 / 120,
            loss_fn=nn.functional.mse_loss,
            methods=[METHODS["svd"](alignment=1)],
            rounds=5,
            epochs=20,
            learning_rate=2e-2,
            stiffness=30.0,
            growth=1.0,
            multipliers=multipliers,
        )
        .rounds[-1]
        .distance
        for multipliers in (False, True)
    ]
    assert gaps[1] < gaps[0] / 10


@pytest.mark.parametrize("loss_metric", ["weight", "fisher"])
def test_the_weights_come_to_be_of_the_ranks(loss_metric) -> None:
    model = make_model()
    weights = copy.deepcopy(model.state_dict())
    learned = learn_ranks(
        model,
        make_labelled(),
        macs=0.5,
        loss_fn=cross_entropy,
        rounds=6,
        growth=6.0,
        loss_metric=loss_metric,
        learning_rate=4e-3,
    )
    first, last = learned.rounds[0], learned.rounds[-1]
    assert last.distance < first.distance / 5
    assert [one.stiffness for one in learned.rounds] == [6.0**n for n in range(6)]
    plan = rankfold.record_of(learned.model).plan
    assert last.ranks == {entry.name: entry.rank for entry in plan.factorized}
    assert plan.after.macs <= 0.5 * plan.before.macs
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def expected_ranks(model: nn.Module, price: float, stiffness: float) -> dict[str, tuple[int]]:
    """Of the least price · cost + stiffness · error of each layer, by its singular values."""
    layers = {name: getattr(model, name) for name in ("stem", "body", "head", "out")}
    weights = {n: m.weight.detach().double().flatten(1) for n, m in layers.items()}
    whole = sum(weight.square().sum().item() for weight in weights.values())
    whole += model.depthwise.weight.detach().double().square().sum().item()
    dense = sum(own.numel() for own in model.parameters())
    found = {}
    for name, weight in weights.items():
        squares = torch.linalg.svdvals(weight).square().numpy()
        ranks = np.arange(1, len(squares) + 1)
        lost = np.append(squares[::-1].cumsum()[::-1][1:], 0.0)
        objective = price / dense * ranks * sum(weight.shape) + stiffness * lost / whole
        if objective.min() < price / dense * weight.numel():
            found[name] = (int(ranks[objective.argmin()]),)
    return found


def test_the_step_of_compression_is_the_least_of_its_objective() -> None:
    """With next to no training: the ranks are those that a search over all of them finds."""
    model, price = make_model(), 4.0
    expected = [expected_ranks(model, price, stiffness) for stiffness in (1.0, 2.5)]
    assert len(expected[0]) > 1 and expected[0] != expected[1]
    for stiffness, ranks in zip((1.0, 2.5), expected, strict=True):
        learned = learn_ranks(
            model,
            make_labelled(),
            price=price,
            cost="params",
            loss_fn=cross_entropy,
            rounds=1,
            stiffness=stiffness,
            learning_rate=1e-9,
            methods=[METHODS["svd"](alignment=1)],
        )
        assert learned.rounds[0].ranks == ranks


def test_a_higher_price_leaves_less() -> None:
    costs = []
    for price in (0.05, 2.0, 20.0):
        learned = learn_ranks(
            make_model(), make_labelled(), price=price, loss_fn=cross_entropy, rounds=2
        )
        plan = rankfold.record_of(learned.model).plan
        assert plan.request == {"price": price, "cost": "macs"}
        costs.append(plan.after.macs)
    assert costs[0] > costs[1] > costs[2]


def test_what_comes_out_is_recovered_saved_and_loaded(tmp_path) -> None:
    model, data = make_model(), make_data()
    learned = learn_ranks(model, data, macs=0.5, teacher=model, rounds=2).model
    recovery = rankfold.recover(learned, data, teacher=model, epochs=1)
    assert recovery.epochs
    rankfold.save(learned, tmp_path / "small")
    again = rankfold.load(tmp_path / "small", like=make_model)
    assert torch.equal(again(data[0]), learned.eval()(data[0]))


def test_training_is_in_the_precision_that_is_asked_for() -> None:
    model, data = make_model(), make_labelled()
    seen = set()

    def loss_fn(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        # Losses are taken in float32; what bfloat16 could hold are the outputs that it made.
        seen.add(bool(torch.equal(outputs, outputs.bfloat16().float())))
        return cross_entropy(outputs, labels)

    for precision in ("float32", "bfloat16"):
        seen.clear()
        learn_ranks(model, data, macs=0.5, loss_fn=loss_fn, rounds=1, precision=precision)
        assert seen == {precision == "bfloat16"}


def test_overrides_settle_single_layers() -> None:
    overrides = Overrides(keep=["stem"], force={"head": "svd"}, greatest_rank={"head": 16})
    for asked in ({"macs": 0.6}, {"price": 0.3}):
        learned = learn_ranks(
            make_model(),
            make_labelled(),
            **asked,
            loss_fn=cross_entropy,
            rounds=1,
            overrides=overrides,
        )
        ranks = learned.rounds[0].ranks
        assert "stem" not in ranks and ranks["head"] <= (16,)


class Mixed(nn.Module):
    """Layers of all the kinds that take part, a tied pair and an attention, that do or do not."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 32)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.grouped = nn.Conv1d(32, 64, 3, padding=1, groups=2)
        self.transposed = nn.ConvTranspose1d(64, 32, 3, padding=1)
        self.tied = nn.Embedding(64, 32)
        self.readout = nn.Linear(32, 64)
        self.readout.weight = self.tied.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        values = self.embedding(tokens) + self.tied(tokens)
        values = self.attention(values, values, values, need_weights=False)[0]
        values = self.transposed(self.grouped(values.mT).relu()).mT
        return self.readout(values.mean(1))


@pytest.mark.parametrize("loss_metric", ["weight", "fisher"])
def test_layers_of_every_kind_take_part(tmp_path, loss_metric) -> None:
    torch.manual_seed(0)
    model = Mixed().eval()
    data = [(torch.randint(0, 64, (4, 8)), torch.randint(0, 64, (4,))) for _ in range(4)]
    force = {"embedding": "svd", "grouped": "svd", "transposed": "tucker2", "attention.q*": "svd"}
    learned = learn_ranks(
        model,
        data,
        params=0.8,
        loss_fn=cross_entropy,
        rounds=2,
        loss_metric=loss_metric,
        overrides=Overrides(force=force),
    )
    ranks = learned.rounds[-1].ranks
    assert {"embedding", "grouped", "transposed", "attention.q_proj"} <= ranks.keys()
    assert "tied" not in ranks and "readout" not in ranks
    with pytest.raises(PlanError, match="'tied' cannot be forced"):
        learn_ranks(
            model,
            data,
            params=0.8,
            loss_fn=cross_entropy,
            rounds=1,
            overrides=Overrides(force={"tied": "svd"}),
        )
    assert learned.model.readout.weight is learned.model.tied.weight
    rankfold.save(learned.model, tmp_path / "small")
    again = rankfold.load(tmp_path / "small", like=Mixed)
    assert torch.equal(again(data[0][0]), learned.model.eval()(data[0][0]))


def test_an_attention_that_stays_dense_stays_torch_s_own(tmp_path) -> None:
    model = Mixed().eval()
    data = [(torch.randint(0, 64, (4, 8)), torch.randint(0, 64, (4,)))]
    overrides = Overrides(keep=["attention*"])
    learned = learn_ranks(
        model, data, params=0.8, loss_fn=cross_entropy, rounds=1, overrides=overrides
    )
    assert isinstance(learned.model.attention, nn.MultiheadAttention)
    rankfold.save(learned.model, tmp_path / "small")
    again = rankfold.load(tmp_path / "small", like=Mixed)
    assert torch.equal(again(data[0][0]), learned.model.eval()(data[0][0]))


def test_the_pull_is_the_mean_of_the_metric() -> None:
    """Over errors of all directions; of embeddings the inputs' moment is a diagonal."""
    for inputs in (weight_of(6), weight_of(6).diagonal().clone(), None):
        moments = Moments(inputs, weight_of(5, seed=1), scale=0.3)
        errors = torch.eye(30, dtype=torch.float64).reshape(30, 5, 6)
        lost = [0.3 * moments.squared_error(one) for one in errors]
        assert _scale(moments) == pytest.approx(sum(lost) / len(lost))


def test_settings_that_make_no_sense_are_refused() -> None:
    model, data = make_model(), make_labelled()
    for asked in ({}, {"macs": 0.5, "price": 1.0}, {"price": -1.0}, {"price": 1.0, "cost": "time"}):
        with pytest.raises(BudgetError):
            learn_ranks(model, data, loss_fn=cross_entropy, **asked)
    with pytest.raises(BudgetError, match="smallest"):
        learn_ranks(model, data, loss_fn=cross_entropy, macs=1e-6)
    for wrong in ({"rounds": 0}, {"epochs": 0}, {"stiffness": 0.0}, {"growth": 0.5}):
        with pytest.raises(RankfoldError, match=next(iter(wrong))):
            learn_ranks(model, data, loss_fn=cross_entropy, macs=0.5, **wrong)
    with pytest.raises(RankfoldError, match="teacher"):
        learn_ranks(model, data, macs=0.5)


def test_training_that_diverges_says_so() -> None:
    with pytest.raises(RankfoldError, match="round 1: the loss became nan"):
        learn_ranks(
            make_model(),
            make_labelled(),
            macs=0.5,
            loss_fn=lambda output, label: cross_entropy(output, label) * float("nan"),
        )


class Interrupted(Exception):
    """In the place of a kill."""


@pytest.mark.parametrize("settings", [{"macs": 0.5}, {"price": 1.0, "multipliers": True}])
def test_interrupted_again_and_again_it_goes_on_to_the_same_network(settings, tmp_path) -> None:
    model, data = make_model(), make_labelled()
    settings = {"loss_fn": cross_entropy, "rounds": 3, "epochs": 2, **settings}
    expected = learn_ranks(model, data, **settings)
    found = None
    for stages in itertools.count(6):  # more each time, so that it ends
        left = iter(range(stages))

        def interrupt(work, description, total=None, left=left):
            if next(left, None) is None:
                raise Interrupted
            return work

        with contextlib.suppress(Interrupted):
            found = learn_ranks(
                model, data, journal=tmp_path / "journal", progress=interrupt, **settings
            )
            break
    assert stages > 8
    assert found.rounds == expected.rounds
    for name, one in expected.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], one)
    with pytest.raises(JournalError, match="rounds was 3, is 4"):
        learn_ranks(model, data, journal=tmp_path / "journal", **{**settings, "rounds": 4})
