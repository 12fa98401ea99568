import sys
from types import ModuleType

import pytest
import torch
from torch import nn

import rankfold
from rankfold import record_of
from rankfold.layers import TransposedLinear, TwoFactorLinear, as_linear, is_transposed_linear
from rankfold.methods import METHODS, WEIGHT_METRIC, Moments, reduction


class Conv1D(nn.Module):
    """What transformers has under this name: y = x W + b, W (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def __repr__(self) -> str:
        return f"Conv1D(nf={self.nf}, nx={self.nx})"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return made.reshape(*x.shape[:-1], self.nf)


@pytest.fixture
def transformers(monkeypatch) -> None:
    """As if it had been imported: what is a `Conv1D` is known by that alone."""
    module = ModuleType("transformers.pytorch_utils")
    module.Conv1D = Conv1D
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", module)


def test_only_where_transformers_is(monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "transformers.pytorch_utils", raising=False)
    assert not is_transposed_linear(Conv1D(3, 2))
    assert "transformers.pytorch_utils" not in sys.modules


def test_as_linear_shares_memory(transformers) -> None:
    layer = Conv1D(5, 3).eval()
    layer.weight.requires_grad_(False)
    linear, tensor = as_linear(layer), torch.randn(2, 4, 3)
    assert is_transposed_linear(layer) and not is_transposed_linear(linear)
    torch.testing.assert_close(linear(tensor), layer(tensor))
    assert linear.weight.data_ptr() == layer.weight.data_ptr() and not linear.training
    assert not linear.weight.requires_grad and linear.bias.requires_grad


@pytest.mark.parametrize("name", ["svd", "full-rank", "interpolative", "block-diagonal"])
def test_methods_take_it_as_the_linear_layer_that_it_is(transformers, name: str) -> None:
    layer, method = Conv1D(24, 16), METHODS[name]()
    root = torch.randn(16, 16, dtype=torch.float64)
    for moments in (WEIGHT_METRIC, Moments(root @ root.mT)):
        ours = reduction.fit(method, layer, moments)
        theirs = reduction.fit(method, as_linear(layer), moments)
        assert ours.ranks() == theirs.ranks()
        rank = ours.ranks()[0]
        assert ours.loss(rank) == pytest.approx(theirs.loss(rank), rel=1e-4)
        tensor = torch.randn(5, 16)
        torch.testing.assert_close(
            ours.build(rank)(tensor), theirs.build(rank)(tensor), rtol=1e-3, atol=1e-3
        )
        assert repr(reduction.skeleton(method, layer, rank)) == repr(ours.build(rank))


def test_a_network_of_them(transformers, tmp_path) -> None:
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 24)).eval()
    model = nn.Sequential(Conv1D(48, 24), nn.ReLU(), Conv1D(24, 48)).eval()
    for theirs, ours in ((linear[0], model[0]), (linear[2], model[2])):
        ours.weight.data, ours.bias.data = theirs.weight.data.mT.clone(), theirs.bias.data.clone()
    data = list(torch.randn(8, 6, 5, 24))
    found = [rankfold.analyze(one, data, metric="fisher", check=False) for one in (model, linear)]
    for ours, theirs in zip(*(one.layers for one in found), strict=True):
        assert (ours.macs, ours.parameters) == (theirs.macs, theirs.parameters)
        torch.testing.assert_close(ours.moments.inputs, theirs.moments.inputs)
        torch.testing.assert_close(ours.moments.gradients, theirs.moments.gradients)
        losses = [[c.loss for c in layer.candidates] for layer in (ours, theirs)]
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-12)
    small = rankfold.factorize(model, found[0].plan(params=0.7))
    assert any(isinstance(module, TwoFactorLinear) for module in small.modules())
    rankfold.save(small, tmp_path / "small")
    loaded = rankfold.load(tmp_path / "small", model)
    assert torch.equal(loaded(data[0]), small(data[0]))
    names = [entry.name for entry in record_of(small).plan.factorized]
    assert [one.layer for one in rankfold.refit(small, model, data, names).layers] == names


def test_a_layer_that_multiplies_by_the_weight_of_another() -> None:
    weight = nn.Parameter(torch.randn(4, 3))
    layer, tensor = TransposedLinear(weight), torch.randn(2, 5, 4)
    torch.testing.assert_close(layer(tensor), tensor @ weight)
    assert layer.weight is weight
