"""Layers of few factors to write networks with."""

import math

import pytest
import torch
from geometry import PADDING_MODES, relative
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import rankfold
from rankfold.errors import ModelError, RankError
from rankfold.layers import FlattenedConv2d, LowRankConv2d, LowRankLinear, SeparableConv2d
from rankfold.methods import METHODS

CONVOLUTIONS = [LowRankConv2d, SeparableConv2d, FlattenedConv2d]
WITH_NORM = [LowRankConv2d, SeparableConv2d]


def rank_of(kind: type[nn.Module], rank: int) -> dict[str, int]:
    return {} if kind is FlattenedConv2d else {"rank": rank}


@st.composite
def made(draw, kinds=CONVOLUTIONS, **settings):
    """A layer, the dense one of the same arguments, and inputs."""
    kind = draw(st.sampled_from(kinds))
    inputs, outputs = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
    geometry = {
        "kernel_size": draw(st.one_of(st.integers(1, 3), pairs)),
        "stride": draw(st.one_of(st.integers(1, 2), pairs)),
        "padding": draw(st.one_of(st.integers(0, 2), pairs)),
        "dilation": draw(st.one_of(st.integers(1, 2), pairs)),
        "bias": draw(st.booleans()),
        "padding_mode": draw(st.sampled_from(PADDING_MODES)),
        "dtype": torch.float64,
    }
    layer = kind(inputs, outputs, **geometry, **rank_of(kind, 1), **settings)
    dense = nn.Conv2d(inputs, outputs, **geometry)
    return layer, dense, torch.randn(3, inputs, 9, 10, dtype=torch.float64)


@given(made())
def test_it_is_the_dense_layer_that_it_represents(drawn) -> None:
    layer, dense, inputs = drawn
    assert repr(layer.to_dense()) == repr(dense)
    assert relative(layer(inputs), layer.to_dense()(inputs)) < 1e-12


@given(made(WITH_NORM, batch_norm=True))
def test_a_batch_norm_stands_between_the_factors(drawn) -> None:
    layer, dense, inputs = drawn
    assert [type(one) for one in layer] == [nn.Conv2d, nn.BatchNorm2d, nn.Conv2d]
    assert layer(inputs).shape == dense(inputs).shape
    with pytest.raises(ModelError, match="fold_batch_norms"):
        layer.to_dense()
    between = layer[1](layer[0](inputs))
    assert between.mean().abs() < 1e-12 and between.shape[1] == 1


@pytest.mark.parametrize("kind", WITH_NORM)
def test_its_batch_norm_is_folded_for_deployment(kind) -> None:
    network = nn.Sequential(kind(3, 8, 3, rank=4, padding=1, batch_norm=True), nn.ReLU())
    batch = torch.randn(16, 3, 8, 8)
    for _ in range(5):
        network(3 * batch + 1)
    network.eval()
    folded = rankfold.fold_batch_norms(network, batch)
    assert not any(isinstance(one, nn.BatchNorm2d) for one in folded.modules())
    assert relative(folded(batch), network(batch)) < 1e-5


@pytest.mark.parametrize("gain", [1.0, 2**0.5])
@pytest.mark.parametrize("kind", [LowRankLinear, *CONVOLUTIONS])
def test_the_weight_has_the_wanted_norm_and_the_bias_is_zero(kind, gain) -> None:
    layer = kind(
        12, 20, **({} if kind is LowRankLinear else {"kernel_size": 3}), **rank_of(kind, 4)
    )
    layer.reset_parameters(gain)
    dense = layer.to_dense()
    square = dense.weight.square().mean().item()
    assert square == pytest.approx(gain**2 / dense.weight[0].numel(), rel=1e-4)
    assert not dense.bias.any()


def through_ten(make, inputs: torch.Tensor) -> float:
    """The mean square behind ten layers with ReLUs, over that of the inputs."""
    values = inputs
    for _ in range(10):
        layer = make()
        layer.reset_parameters(2**0.5)
        values = layer(values).relu()
    return (values.square().mean() / inputs.square().mean()).item()


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: LowRankLinear(256, 256, 64), (128, 256)),
        (lambda: LowRankConv2d(32, 32, 3, 24, padding=1, padding_mode="circular"), (8, 32, 8, 8)),
        (lambda: SeparableConv2d(32, 32, 3, 24, padding=1, padding_mode="circular"), (8, 32, 8, 8)),
        (lambda: FlattenedConv2d(96, 96, 3, padding=1, padding_mode="circular"), (8, 96, 8, 8)),
    ],
    ids=["linear", "low-rank", "separable", "flattened"],
)
@torch.no_grad()
def test_activations_keep_their_variance_through_ten_layers(make, shape) -> None:
    """In the mean over networks; of torch's own values two factors leave an 18th each time."""
    gains = [math.log(through_ten(make, torch.randn(shape))) for _ in range(12)]
    assert abs(sum(gains) / len(gains)) < math.log(4)


@pytest.mark.parametrize("kind", WITH_NORM)
@torch.no_grad()
def test_with_batch_norms_they_keep_it_closely(kind) -> None:
    def make() -> nn.Module:
        return kind(16, 16, 3, 8, padding=1, padding_mode="circular", batch_norm=True)

    assert through_ten(make, torch.randn(32, 16, 8, 8)) == pytest.approx(1, abs=0.2)


def test_ranks_outside_the_layer_are_refused() -> None:
    for rank in (0, 7):
        with pytest.raises(RankError):
            LowRankLinear(8, 6, rank)
    for kind in WITH_NORM:
        with pytest.raises(RankError):
            kind(2, 3, 3, rank=100)


def test_device_and_dtype_are_as_asked_for() -> None:
    for layer in (
        LowRankLinear(8, 6, 2, device="meta", dtype=torch.bfloat16),
        SeparableConv2d(8, 6, 3, 2, batch_norm=True, device="meta", dtype=torch.bfloat16),
        FlattenedConv2d(8, 6, 3, device="meta", dtype=torch.bfloat16),
    ):
        floating = [one for one in layer.state_dict().values() if one.is_floating_point()]
        assert all(one.is_meta and one.dtype == torch.bfloat16 for one in floating)
    with torch.device("meta"):
        assert LowRankConv2d(8, 6, 3, 2)[0].weight.is_meta


def test_they_are_of_the_forms_that_methods_fit() -> None:
    """A dense layer's factors can be loaded into them."""
    dense = nn.Conv2d(8, 6, 3, padding=1)
    for name, kind in (("svd", LowRankConv2d), ("separable", SeparableConv2d)):
        form = METHODS[name]().skeleton(dense, (4,))
        layer = kind(8, 6, 3, 4, padding=1)
        assert isinstance(layer, type(form))
        assert {n: v.shape for n, v in layer.state_dict().items()} == {
            n: v.shape for n, v in form.state_dict().items()
        }
