import pytest
import torch
from geometry import linears, relative
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rankfold.errors import RankError
from rankfold.layers import TwoFactorLinear


@given(linears(dtype=torch.float64), st.data())
def test_it_is_the_dense_layer_that_it_represents(drawn, data) -> None:
    layer, shape = drawn
    rank = data.draw(st.integers(1, min(layer.in_features, layer.out_features)))
    form = TwoFactorLinear(layer, rank)
    dense = form.to_dense()
    assert repr(dense) == repr(layer)
    assert [type(factor) for factor in form] == [nn.Linear, nn.Linear]
    inputs = torch.randn(shape, dtype=torch.float64)
    assert relative(form(inputs), dense(inputs)) < 1e-12
    assert form[0].bias is None and (form[1].bias is None) == (layer.bias is None)


def test_the_dense_layer_is_a_copy_of_its_own() -> None:
    form = TwoFactorLinear(nn.Linear(8, 6), 3).eval()
    dense = form.to_dense()
    assert not dense.training
    with torch.no_grad():
        dense.bias.fill_(7)
    assert not (form[1].bias == 7).any()


@pytest.mark.parametrize("rank", [0, 7])
def test_ranks_outside_the_layer_are_refused(rank) -> None:
    with pytest.raises(RankError, match=r"1\.\.6"):
        TwoFactorLinear(nn.Linear(8, 6), rank)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_what_is_frozen_and_only_that_is_frozen_in_the_dense_layer(frozen) -> None:
    """Whatever the context in which the factors are multiplied."""
    form = TwoFactorLinear(nn.Linear(8, 6), 3)
    for name, parameter in form.named_parameters():
        parameter.requires_grad_(not name.endswith(frozen))
    expected = {"weight": frozen != "weight", "bias": frozen != "bias"}
    assert {n: p.requires_grad for n, p in form.to_dense().named_parameters()} == expected
    with torch.no_grad():
        dense = form.to_dense()
    assert {n: p.requires_grad for n, p in dense.named_parameters()} == expected
