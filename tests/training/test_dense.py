"""Factorized networks as dense ones again."""

import copy

import pytest
import torch
from geometry import relative
from networks import make_data, make_model
from torch import nn

import rankfold
from rankfold.errors import UnsupportedLayerError
from rankfold.training import dense_again


def factorized(model: nn.Module, data, **budget) -> nn.Module:
    methods = budget.pop("methods", None)
    return rankfold.factorize(
        model, rankfold.analyze(model, data, methods=methods, metric="weight").plan(**budget)
    )


def assert_same_network(small: nn.Module, model: nn.Module, batch: torch.Tensor) -> nn.Module:
    weights = copy.deepcopy(model.state_dict())
    dense = dense_again(small, like=model)
    assert repr(dense) == repr(model)
    assert relative(dense.eval()(batch), small.eval()(batch)) < 1e-5
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    return dense


@pytest.mark.parametrize("methods", [None, ["separable3"], ["interpolative"]])
def test_it_does_the_same_and_is_of_the_same_shapes(methods) -> None:
    model, data = make_model(), make_data()
    small = factorized(model, data, fraction=0.4) if methods is None else None
    small = small or factorized(model, data, macs=0.6, methods=methods)
    rankfold.recover(small, data, teacher=model, epochs=1)  # statistics of batch norm are others
    dense = assert_same_network(small, model, data[0])
    ranks = torch.linalg.matrix_rank(dense.body.weight.detach().flatten(1))
    assert isinstance(small.body, nn.Conv2d) or methods or ranks < 48


def test_what_is_frozen_and_the_mode_are_those_of_the_original() -> None:
    model, data = make_model().train(), make_data()
    model.stem.requires_grad_(False)
    small = factorized(model, data, fraction=0.4).eval().requires_grad_(True)
    dense = dense_again(small, like=model)
    assert (
        dense.training and not dense.stem.weight.requires_grad and dense.body.weight.requires_grad
    )


class TiedNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 24)
        self.readout = nn.Linear(24, 50)
        self.readout.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.readout(self.embedding(tokens).mean(1))


def test_tied_weights_stay_tied() -> None:
    model, tokens = TiedNetwork(), torch.randint(0, 50, (6, 1))
    small = factorized(model, [tokens], fraction=0.3)
    dense = assert_same_network(small, model, tokens)
    assert dense.readout.weight is dense.embedding.weight
    assert torch.linalg.matrix_rank(dense.readout.weight.detach()) <= 8


def test_attention_that_was_taken_apart_is_torch_s_own_again() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    batch = torch.randn(3, 6, 32)
    small = factorized(model, [batch], fraction=0.4)
    dense = assert_same_network(small, model, batch)
    assert isinstance(dense.layers[0].self_attn, nn.MultiheadAttention)


def test_a_single_layer_is_a_network() -> None:
    model, batch = nn.Linear(24, 16), torch.randn(5, 24)
    assert_same_network(factorized(model, [batch], fraction=0.3), model, batch)


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(12, 32, batch_first=True)
        self.head = nn.Linear(32, 5)

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.head(self.recurrent(tensor)[0])


def test_forms_that_no_dense_layer_is_equal_to_are_refused() -> None:
    model, batch = Reader(), torch.randn(4, 6, 12)
    small = factorized(model, [batch], params=0.5, methods=["fewer-units"])
    with pytest.raises(UnsupportedLayerError, match="recurrent"):
        dense_again(small, like=model)
    back = factorized(model, [batch], params=0.95, methods=["low-rank-inputs"])
    dense_again(back, like=model)


def test_another_network_is_refused() -> None:
    with pytest.raises(UnsupportedLayerError, match="'weight' of layer '0'"):
        dense_again(nn.Sequential(nn.Linear(3, 4)), like=nn.Sequential(nn.Linear(4, 4)))
