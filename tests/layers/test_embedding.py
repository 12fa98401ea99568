import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rankfold.cost import count_parameters
from rankfold.errors import RankError
from rankfold.layers import TiedLayers, TiedTwoFactor, TwoFactorEmbedding


@given(st.integers(1, 9), st.integers(1, 9), st.booleans(), st.data())
def test_it_looks_up_the_product(count: int, width: int, padded: bool, data) -> None:
    rank = data.draw(st.integers(1, min(count, width)))
    padding = data.draw(st.integers(0, count - 1)) if padded else None
    layer = nn.Embedding(count, width, padding, dtype=torch.float64).eval()
    form = TwoFactorEmbedding(layer, rank).eval()
    ids = torch.randint(count, (2, 3))
    dense = form.to_dense()
    assert repr(dense) == repr(layer) and not dense.training
    torch.testing.assert_close(form(ids), dense(ids))
    if padding is not None:
        assert not form(torch.tensor(padding)).any()
    with pytest.raises(RankError):
        TwoFactorEmbedding(layer, min(count, width) + 1)


def tied(bias: bool = True) -> TiedLayers:
    first, second = nn.Embedding(7, 4, padding_idx=1), nn.Embedding(7, 4)
    linear = nn.Linear(4, 7, bias)
    second.weight = linear.weight = first.weight
    return TiedLayers([first, linear, second])


@pytest.mark.parametrize("order", [[0, 1, 2], [1, 0, 2]])
def test_layers_with_one_weight_have_one_pair_of_factors(order: list[int]) -> None:
    layers = TiedLayers([tied()[place] for place in order])
    form = TiedTwoFactor(layers, 2)
    assert count_parameters(form) == 7 * 2 + 2 * 4 + 7
    assert count_parameters(layers) >= 7 * 4 + 7
    table, other = torch.randn(7, 2), torch.randn(4, 2)
    form.assign(table, other, layers)
    assert count_parameters(form) == 7 * 2 + 2 * 4 + 7
    ids, features = torch.randint(7, (2, 3)), torch.randn(2, 3, 4)
    dense = form.to_dense()
    assert len({id(layer.weight) for layer in dense}) == 1
    torch.testing.assert_close(dense[0].weight, table @ other.mT)
    torch.testing.assert_close(form(ids), dense(ids))
    torch.testing.assert_close(form(features), dense(features))
    for place, layer in zip(order, layers, strict=True):
        assert repr(dense[order.index(place)]) == repr(layer)
    # A step of training moves them together.
    optimizer = torch.optim.SGD(form.parameters(), 0.1)
    (form(ids).sum() + form(features).square().sum()).backward()
    optimizer.step()
    after = form.to_dense()
    torch.testing.assert_close(form(features), after(features))
    torch.testing.assert_close(form(ids), after(ids))


def test_ties_outlast_copies_and_devices() -> None:
    form = TiedTwoFactor(tied(), 2, "meta")
    there = form.to_empty(device="cpu")
    assert there is form and count_parameters(form) == 7 * 2 + 2 * 4 + 7
    assert count_parameters(copy.deepcopy(form).double()) == 7 * 2 + 2 * 4 + 7
    assert {p.device.type for p in form.parameters()} == {"cpu"}


def test_frozen_weights_stay_so() -> None:
    layers = tied(bias=False)
    layers.weight.requires_grad_(False)
    form = TiedTwoFactor(layers, 3)
    form.assign(torch.randn(7, 3), torch.randn(4, 3), layers)
    assert not any(p.requires_grad for p in form.parameters())
