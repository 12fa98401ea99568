import copy
from itertools import pairwise

import pytest
import torch
from networks import make_data, make_model
from torch import nn

import rankfold
from rankfold.analysis import Overrides
from rankfold.errors import CalibrationError, ModelError
from rankfold.measure import output_error
from rankfold.methods import WEIGHT_METRIC, LowRank
from rankfold.refit import refit


def networks(macs: float = 0.4):
    model = make_model().eval()
    plan = rankfold.analyze(model, make_data(), metric="weight").plan(macs=macs)
    return model, rankfold.factorize(model, plan), [entry.name for entry in plan.factorized]


def error(model: nn.Module, small: nn.Module) -> float:
    with torch.no_grad():
        pairs = [(model(batch), small.eval()(batch)) for batch in make_data()]
    return sum(output_error(*pair) for pair in pairs)


@pytest.mark.parametrize("through_relu", [False, True])
def test_outputs_come_nearer_and_only_fitted_factors_change(through_relu) -> None:
    model, small, names = networks()
    before = copy.deepcopy(small)
    done = refit(small, model, make_data(), names, through_relu=through_relu)
    assert {one.layer for one in done.layers} == set(names) and done.gain > 1
    assert error(model, small) < error(model, before)
    fitted = {f"{name}.{len(small.get_submodule(name)) - 1}" for name in names}
    fitted |= {f"{name}.0" for name in names if len(small.get_submodule(name)) == 2}
    assert len(fitted) > len(names)
    for name, value in small.state_dict().items():
        if name.rpartition(".")[0] not in fitted:
            assert torch.equal(value, before.state_dict()[name])


def test_the_divergence_held_out_never_grows() -> None:
    model, small, names = networks()
    done = refit(small, model, make_data(), names).layers
    for one, following in pairwise(done):
        assert following.before == (one.after if one.kept else one.before)
        assert following.before <= one.before


def test_a_last_factor_that_was_spoilt_is_found_again() -> None:
    """Where the others are exact it is a regression without an error."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 10, 3, padding=1), nn.ReLU(inplace=True)).double().eval()
    small = copy.deepcopy(model)
    small[0] = LowRank().fit(model[0], WEIGHT_METRIC).build((10,))
    with torch.no_grad():
        small[0][-1].weight.mul_(0.5)
        small[0][-1].bias.add_(1)
    data = [torch.randn(4, 6, 9, 9).double() for _ in range(6)]
    refit(small, model, data, ["0"])
    with torch.no_grad():
        assert output_error(model(data[0]), small(data[0])) < 1e-2


@pytest.mark.parametrize("through_relu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_two_factors_are_fitted_together(bias, through_relu) -> None:
    """A weight whose inputs come bent needs other features, not only another use of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10, bias=bias), nn.ReLU()).double().eval()
    small = copy.deepcopy(model)
    small[0] = LowRank(alignment=1).fit(model[0], WEIGHT_METRIC).build((4,))
    stretched = torch.linspace(0.1, 3, 12, dtype=torch.float64)
    data = [torch.randn(256, 12).double() * stretched for _ in range(6)]
    alone = copy.deepcopy(small)
    alone[0] = nn.Sequential(*alone[0])  # of no known form: the last factor alone is fitted
    first = small[0][0].weight.detach().clone()
    gains = [
        refit(one, model, data, ["0"], through_relu=through_relu).gain for one in (alone, small)
    ]
    assert gains[1] > 1.2 * gains[0] > 1.2
    assert torch.equal(alone[0][0].weight, first) and not torch.equal(small[0][0].weight, first)


def test_it_is_fitted_to_what_the_layers_before_it_give() -> None:
    """The second layer makes up for a first one that scales everything down."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 6)).eval()
    small = copy.deepcopy(model)
    small[1] = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 6))
    with torch.no_grad():
        small[0].weight.mul_(0.25)
        small[1][0].weight.copy_(torch.eye(8))
        small[1][1].weight.copy_(model[1].weight)
        small[1][1].bias.copy_(model[1].bias)
    data = [torch.randn(64, 8) for _ in range(8)]
    done = refit(small, model, data, ["1"])
    assert done.gain > 100
    torch.testing.assert_close(small[1][1].weight, 4 * model[1].weight, rtol=0.1, atol=0.1)


def test_through_a_relu_what_it_cuts_off_does_not_count() -> None:
    """One feature for two outputs that agree only where they are positive."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU()).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [1.0]]))
        model[0].bias.copy_(torch.tensor([-1.0, 0.5]))
    small = copy.deepcopy(model)
    small[0] = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 2))
    with torch.no_grad():
        small[0][0].weight.fill_(1.0)
        small[0][0].weight.requires_grad_(False)
    data = [torch.randn(256, 1) for _ in range(6)]
    # Inputs that the factor gets are bent, so no linear map of them is right everywhere.
    small = nn.Sequential(nn.Softplus(beta=2), *small)
    model = nn.Sequential(nn.Identity(), *model)
    linear, bent = copy.deepcopy(small), copy.deepcopy(small)
    refit(linear, model, data, ["1"])
    refit(bent, model, data, ["1"], through_relu=True)
    with torch.no_grad():
        plain, through = (
            sum(output_error(model(batch), one(batch)) for batch in data) for one in (linear, bent)
        )
    assert through < 0.9 * plain


def test_a_batch_norm_before_the_relu_is_seen_through() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
    model.train()(torch.randn(32, 8, 8, 8) + 1)
    model.eval()
    data = [torch.randn(4, 8, 8, 8) + 1 for _ in range(6)]
    plan = rankfold.analyze(model, data, metric="weight").plan(macs=0.65)
    errors = []
    for through in (False, True):
        small = rankfold.factorize(model, plan)
        refit(small, model, data, ["0"], through_relu=through)
        with torch.no_grad():
            errors.append(sum(output_error(model(batch), small(batch)) for batch in data))
    assert errors[1] < errors[0]


def test_the_same_seed_gives_the_same_factors() -> None:
    found = []
    for _ in range(2):
        model, small, names = networks()
        refit(small, model, make_data(), names, seed=3)
        found.append(small.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_one_batch_serves_for_both() -> None:
    model, small, names = networks()
    assert refit(small, model, make_data()[:1], names).gain > 1


def test_what_cannot_be_is_refused() -> None:
    model, small, names = networks()
    with pytest.raises(ModelError, match="no layer 'nowhere'"):
        refit(small, model, make_data(), ["nowhere"])
    with pytest.raises(CalibrationError, match="yields no batch"):
        refit(small, model, [], names)
    assert refit(small, model, make_data(), []).gain == 1


def test_calls_that_only_one_of_the_networks_makes_do_not_count() -> None:
    """The data decides how often a layer runs, and on how much of it."""

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body = nn.Linear(16, 16), nn.Linear(16, 16)
            self.turns = 1

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            given = self.stem(given)[: 4 - self.turns]
            for _ in range(self.turns):
                given = self.body(given)
            return given.mean(0)

    model = Branching().eval()
    small = copy.deepcopy(model)
    small.body, small.turns = LowRank().fit(model.body, WEIGHT_METRIC).build((4,)), 2
    before = copy.deepcopy(small.state_dict())
    done = refit(small, model, [torch.randn(4, 16)] * 3, ["body"]).layers
    assert [(one.layer, one.kept) for one in done] == [("body", False)]
    assert all(torch.equal(before[name], value) for name, value in small.state_dict().items())


def test_under_autocast_what_reaches_a_layer_is_of_another_dtype() -> None:
    model, small, names = networks()

    def autocast(network: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return network(batch)

    done = refit(small, model, make_data(), names, forward=autocast).layers
    assert {one.layer for one in done} == set(names) and any(one.kept for one in done)


class Reader(nn.Module):
    """A linear layer that alone reads an LSTM, whose readout it can take in."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(12, 32, batch_first=True)
        self.between = nn.Linear(32, 24)
        self.out = nn.Linear(24, 5)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.between(self.recurrent(given)[0])))


def test_a_layer_that_has_taken_in_a_readout_is_refitted() -> None:
    """It is given fewer numbers than the dense one, whose weight says nothing of these."""
    torch.manual_seed(0)
    model, data = Reader().eval(), [torch.randn(8, 6, 12) for _ in range(10)]
    force = {"recurrent": "fewer-units", "between": "svd"}
    plan = rankfold.analyze(model, data).plan(macs=0.6, overrides=Overrides(force=force))
    small = rankfold.factorize(model, plan)
    assert small.between[0].in_features == small.recurrent.hidden_size < 32
    before = copy.deepcopy(small)
    done = refit(small, model, data, ["between"])
    assert [one.layer for one in done.layers] == ["between"] and done.gain > 1
    assert torch.equal(small.between[0].weight, before.between[0].weight)
    with torch.no_grad():
        errors = [output_error(model(data[0]), one.eval()(data[0])) for one in (small, before)]
    assert errors[0] < errors[1]
