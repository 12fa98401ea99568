import pytest
import torch
from geometry import convolutions
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rankfold.errors import RankError
from rankfold.layers import TuckerConvolution, TwoFactorConvolution


@given(convolutions(), st.data())
def test_factors_are_torchs_own_and_only_one_has_the_geometry(drawn, data) -> None:
    layer, shape = drawn
    rank_out = data.draw(st.integers(1, layer.out_channels))
    rank_in = data.draw(st.integers(1, layer.in_channels))
    form = TuckerConvolution(layer, (rank_out, rank_in))
    assert [type(factor) for factor in form] == [type(layer)] * 3
    assert [factor.out_channels for factor in form] == [rank_in, rank_out, layer.out_channels]
    for pointwise in (form[0], form[2]):
        assert set(pointwise.kernel_size) == set(pointwise.stride) == {1}
    spatial = form[1]
    for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode"):
        assert getattr(spatial, name) == getattr(layer, name)
    assert form(torch.randn(shape)).shape == layer(torch.randn(shape)).shape
    assert repr(form.to_dense()) == repr(layer)


def test_initial_values_are_torchs_and_on_the_layers_device() -> None:
    form = TwoFactorConvolution(nn.Conv2d(8, 16, 3, device="meta"), 4)
    assert all(parameter.is_meta for parameter in form.parameters())
    form = TwoFactorConvolution(nn.Conv2d(8, 16, 3, dtype=torch.float64), 4)
    assert form[0].weight.std() > 0 and form[0].weight.dtype == torch.float64


@pytest.mark.parametrize("rank", [0, 17])
def test_ranks_outside_the_layer_are_refused(rank) -> None:
    layer = nn.Conv2d(8, 16, 3)
    with pytest.raises(RankError, match=r"1\.\.16"):
        TwoFactorConvolution(layer, rank)
    with pytest.raises(RankError, match=r"1\.\.16, 1\.\.8"):
        TuckerConvolution(layer, (rank, 8))
    with pytest.raises(RankError):
        TuckerConvolution(layer, (8,))


def test_compiles_exports_and_round_trips_like_any_module() -> None:
    form = TuckerConvolution(nn.Conv2d(8, 16, 3, padding=1), (4, 4)).eval()
    inputs = torch.randn(2, 8, 5, 5)
    exported = torch.export.export(form, (inputs,)).module()
    torch.testing.assert_close(exported(inputs), form(inputs))
    other = TuckerConvolution(nn.Conv2d(8, 16, 3, padding=1), (4, 4)).eval()
    other.load_state_dict(form.state_dict())
    assert torch.equal(other(inputs), form(inputs))


@pytest.mark.parametrize("gradients", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("trained", [True, False])
def test_the_dense_layer_is_a_copy_as_trainable_and_in_the_same_mode(gradients, trained) -> None:
    layer = nn.Conv2d(8, 16, 3)
    for form in (TwoFactorConvolution(layer, 4), TuckerConvolution(layer, (4, 4))):
        form.train(trained).requires_grad_(trained)
        with gradients():
            dense = form.to_dense()
        assert dense.training == trained
        with torch.no_grad():
            dense.bias.fill_(7)
        assert not (form[-1].bias == 7).any()
        assert {parameter.requires_grad for parameter in dense.parameters()} == {trained}
