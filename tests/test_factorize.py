import copy
import dataclasses

import pytest
import torch
from networks import make_data, make_model
from torch import nn

import rankfold
from rankfold.errors import ModelError, PlanError
from rankfold.layers import TuckerConvolution, TwoFactorLinear


def plan_for(model: nn.Module, batch: torch.Tensor, **budget: float) -> rankfold.Plan:
    return rankfold.analyze(model, [batch]).plan(**budget)


def test_original_is_untouched_and_no_memory_is_shared() -> None:
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    small = rankfold.factorize(model, plan_for(model, make_data()[0], fraction=0.2))
    assert isinstance(small.body, TuckerConvolution) and isinstance(small.head, TwoFactorLinear)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_modes_gradients_and_dtype_are_kept() -> None:
    model = make_model().double().train()
    model.body.eval().requires_grad_(False)
    small = rankfold.factorize(model, plan_for(model, make_data()[0].double(), fraction=0.2))
    assert small.training and not small.body.training and not small.body[1].training
    assert not any(parameter.requires_grad for parameter in small.body.parameters())
    assert all(parameter.dtype == torch.float64 for parameter in small.parameters())


def test_a_shared_layer_is_factorized_once_and_stays_shared() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(64, 64)
            self.blocks = nn.ModuleList([self.first])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks[0](self.first(x))

    model = Twice().eval()
    batch = torch.randn(4, 64)
    plan = plan_for(model, batch, fraction=0.25)
    small = rankfold.factorize(model, plan)
    assert small.first is small.blocks[0]
    assert isinstance(small.first, TwoFactorLinear)
    assert plan.before.macs == 2 * 64 * 64 and plan.after.macs == 2 * 2 * 16 * 64


def test_a_model_that_is_one_layer() -> None:
    model = nn.Linear(64, 64)
    small = rankfold.factorize(model, plan_for(model, torch.randn(2, 64), fraction=0.25))
    assert isinstance(small, TwoFactorLinear)
    assert rankfold.record_of(small).plan.factorized


def test_a_plan_of_another_network_is_refused_whole() -> None:
    model = make_model()
    plan = plan_for(model, make_data()[0], fraction=0.2)
    other = make_model()
    other.head = nn.Linear(768, 64, bias=False)
    with pytest.raises(PlanError, match=r"bias=False.*while factorizing layer 'head'"):
        rankfold.factorize(other, plan)
    del other.body
    with pytest.raises(PlanError, match=r"no such layer.*'body'"):
        rankfold.factorize(other, plan)


def test_a_method_that_does_not_take_the_layer_is_refused() -> None:
    model = make_model()
    plan = plan_for(model, make_data()[0], fraction=0.2)
    wrong = [
        dataclasses.replace(e, method="tucker2", rank=(8, 8)) if e.name == "head" else e
        for e in plan.layers
    ]
    with pytest.raises(PlanError, match=r"'tucker2' does not take it.*'head'"):
        rankfold.factorize(model, dataclasses.replace(plan, layers=tuple(wrong)))


def test_weights_that_are_not_finite_name_their_layer() -> None:
    model = make_model()
    plan = plan_for(model, make_data()[0], fraction=0.2)
    with torch.no_grad():
        model.head.weight[0, 0] = torch.inf
    with pytest.raises(ModelError, match=r"NaN or infinity.*'head'"):
        rankfold.factorize(model, plan)


def test_only_factorized_models_have_a_record() -> None:
    with pytest.raises(PlanError, match="not made by"):
        rankfold.record_of(make_model())
