import copy

import pytest
import torch
from torch import nn

from rankfold.copies import copy_of


class Keeping(nn.Module):
    """Keeps what it gave last, nested, and as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.utils.weight_norm(nn.Linear(4, 3))

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        self.last = self.layer(given)
        self.history = {"all": [self.last, given]}
        return self.last


def test_copies_what_keeps_computed_tensors() -> None:
    model, given = Keeping(), torch.randn(2, 4)
    expected = model(given)
    with pytest.raises(RuntimeError):
        copy.deepcopy(model)
    made = copy_of(model)
    assert made.last is made.history["all"][0]
    assert torch.equal(made.last, expected) and made.last.grad_fn is None
    assert model.last is expected and expected.grad_fn is not None
    assert torch.equal(made(given), expected)
    assert {id(one) for one in made.parameters()}.isdisjoint(id(one) for one in model.parameters())


def test_shared_parameters_stay_shared() -> None:
    layer = nn.Linear(4, 4)
    made = copy_of(nn.Sequential(layer, layer))
    assert made[0] is made[1] and made[0] is not layer


def test_what_a_copy_of_its_own_making_leaves_out_is_there() -> None:
    model = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4)))
    model.__dict__["remembered"] = ["this"]
    made = copy_of(model)
    assert made.remembered == ["this"] and made.remembered is not model.remembered


def test_copies_of_scripted_parts_are_trained_by_themselves() -> None:
    model = nn.Sequential(torch.jit.script(nn.Linear(4, 3)), nn.Linear(3, 2))
    made = copy_of(model)
    assert all(parameter.is_leaf for parameter in made.parameters())
    made(torch.randn(5, 4)).sum().backward()
    assert all(parameter.grad is not None for parameter in made.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
