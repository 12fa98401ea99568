import copy

import pytest
import torch
from networks import make_data, make_model
from tensors import tensor_of
from torch import nn

import rankfold
from rankfold.layers import TuckerConvolution, TwoFactorLinear, balance_factors, factors_of
from rankfold.methods import METHODS, WEIGHT_METRIC


def sizes(form: nn.Module) -> list[float]:
    return [factor.weight.detach().square().mean().sqrt().item() for factor in factors_of(form)]


@pytest.mark.parametrize("name", ["svd", "tucker2", "separable", "cp", "flattened", "tensor-train"])
def test_factors_get_one_scale_and_the_layer_stays_the_same(name) -> None:
    layer = nn.Conv2d(16, 24, 3, padding=1).double()
    method = METHODS[name]()
    family = method.fit(layer, WEIGHT_METRIC)
    form = family.build(family.ranks()[len(family.ranks()) // 2])
    with torch.no_grad():
        factors_of(form)[0].weight.mul_(1e-3)
        factors_of(form)[-1].weight.mul_(1e5)
    given = tensor_of((2, 16, 5, 5))
    before = form(given)
    balance_factors(nn.Sequential(form))
    torch.testing.assert_close(form(given), before)
    assert max(sizes(form)) == pytest.approx(min(sizes(form)))


def test_what_is_frozen_shared_zero_or_no_chain_stays() -> None:
    frozen, zero, sharing, other = (TwoFactorLinear(nn.Linear(8, 8), 4) for _ in range(4))
    frozen[0].weight.requires_grad_(False)
    nn.init.zeros_(zero[1].weight)
    other[0].weight = sharing[0].weight
    norm = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    model = nn.ModuleList([frozen, zero, sharing, other, norm])
    with torch.no_grad():
        for factor in factors_of(model):
            factor.weight.mul_(3)
        sharing[1].weight.mul_(100)
    before = copy.deepcopy(model.state_dict())
    balance_factors(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_network_does_what_it_did() -> None:
    model, data = make_model(), make_data()
    small = rankfold.factorize(model, rankfold.analyze(model, data).plan(macs=0.5)).eval()
    before = small(data[0])
    balance_factors(small)
    assert (small(data[0]) - before).norm() < 1e-5 * before.norm()
    chains = [one for one in small.modules() if isinstance(one, TuckerConvolution)]
    assert all(max(sizes(one)) == pytest.approx(min(sizes(one)), rel=1e-5) for one in chains)
