"""Trains of a kernel whose channels are split into several modes."""

import pytest
import torch
from geometry import relative
from tensors import tensor_of, weight_of
from torch import nn

from rankfold.cost import count_layer_macs, count_parameters
from rankfold.decompose import tensor_train
from rankfold.layers import TensorizedTrainConvolution, channel_modes, factors_of
from rankfold.methods import WEIGHT_METRIC, Moments, TensorizedTrain

LAYERS = [nn.Conv2d(16, 12, 3), nn.Conv1d(14, 18, 5), nn.Conv3d(8, 12, (2, 1, 3))]


def with_train(layer: nn.Module, modes: int, rank: int) -> nn.Module:
    """A layer that is such a train, of random cores."""
    layer = layer.double()
    form = TensorizedTrainConvolution(layer, channel_modes(layer, modes), rank)
    for place, one in enumerate(factors_of(form)):
        one.weight = nn.Parameter(tensor_of(one.weight.shape, seed=place))
    return form.to_dense()


def error(form: nn.Module, layer: nn.Module, moments: Moments) -> float:
    weight = layer.weight.detach()
    return moments.squared_error(form.to_dense().weight.detach() - weight)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("modes", [1, 2, 3])
def test_a_train_is_recovered(layer, modes) -> None:
    exact = with_train(layer, modes, 2)
    family = TensorizedTrain(modes=modes).fit(exact, WEIGHT_METRIC)
    assert relative(family.build((2,)).to_dense().weight, exact.weight) < 1e-12
    assert relative(family.build((1,)).to_dense().weight, exact.weight) > 1e-2
    assert family.loss((2,)) < 1e-12


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("modes", [1, 2, 3])
def test_it_is_no_worse_than_tt_svd(layer, modes) -> None:
    layer = layer.double()
    weight = layer.weight.detach().flatten(2)
    made, given = zip(*channel_modes(layer, modes), strict=True)
    split = weight.movedim(2, 0).reshape(-1, *made, *given)
    order = [axis for k in range(modes) for axis in (1 + k, 1 + modes + k)]
    lengths = [o * i for o, i in zip(made, given, strict=True)]
    tensor = split.permute(0, *order).reshape(-1, *lengths)
    family = TensorizedTrain(modes=modes).fit(layer, WEIGHT_METRIC)
    for rank in (1, 3):
        bound = tensor_train(tensor, rank).relative_error(tensor)
        found = relative(family.build((rank,)).to_dense().weight, layer.weight)
        assert 0.9 * bound < found <= (1 + 1e-9) * bound


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("inputs", ["channels", "patches"])
def test_the_metric_pays_for_every_known_moment(layer, inputs) -> None:
    layer = layer.double()
    length = layer.in_channels if inputs == "channels" else layer.weight[0].numel()
    moments = Moments(weight_of(length, 1), weight_of(layer.out_channels, 2))
    method = TensorizedTrain()
    ours = error(method.fit(layer, moments).build((3,)), layer, moments)
    for fewer in (Moments(moments.inputs), Moments(gradients=moments.gradients), WEIGHT_METRIC):
        assert ours < error(method.fit(layer, fewer).build((3,)), layer, moments)


@pytest.mark.parametrize("modes", [2, 3])
def test_moments_that_are_kronecker_products_over_the_modes_are_met_exactly(modes) -> None:
    """What is a train in their coordinates is found, also below the rank of the weight itself."""
    layer = nn.Conv2d(16, 24, 3)
    exact = with_train(layer, modes, 2)
    made, given = zip(*channel_modes(layer, modes), strict=True)

    def product(lengths: tuple[int, ...], seed: int) -> torch.Tensor:
        whole = torch.ones(1, 1, dtype=torch.float64)
        for place, length in enumerate(lengths):
            whole = torch.kron(whole, weight_of(length, seed + place))
        return whole

    moments = Moments(product(given, 1), product(made, 11))
    family = TensorizedTrain(modes=modes).fit(exact, moments)
    whole = moments.squared_error(exact.weight.detach())
    assert error(family.build((2,)), exact, moments) < 1e-12 * whole
    plain = TensorizedTrain(modes=modes).fit(exact, WEIGHT_METRIC).build((1,))
    assert error(family.build((1,)), exact, moments) < error(plain, exact, moments)


def test_costs_by_hand() -> None:
    """16 inputs as 4 x 4, 24 outputs as 6 x 4; what cores share they do for each slice."""
    layer = nn.Conv2d(16, 24, 3, stride=2, padding=1)
    form = TensorizedTrain().skeleton(layer, (5,))
    assert [one.slices for one in list(form)[:-1]] == [16, 4, 6]
    parameters = 9 * 5, (4 * 5) * (6 * 5), (4 * 5) * 4
    assert count_parameters(form) == sum(parameters) + 24
    counted = count_layer_macs(form, [(1, 16, 10, 10)])  # 5x5 outputs
    assert counted == 25 * (16 * parameters[0] + 4 * parameters[1] + 6 * parameters[2])


def test_candidates_have_fewer_products_than_the_layer() -> None:
    layer = nn.Conv2d(32, 32, 3)
    method = TensorizedTrain()
    *saving, full = method.fit(layer, WEIGHT_METRIC).ranks()
    dense = layer.weight.numel() * 64
    macs = [count_layer_macs(method.skeleton(layer, rank), [(1, 32, 10, 10)]) for rank in saving]
    assert macs == sorted(macs) and macs[-1] < dense
    beyond = method.skeleton(layer, (saving[-1][0] + 1,))
    assert count_layer_macs(beyond, [(1, 32, 10, 10)]) >= dense
    assert full == (32,)


def test_compiles_exports_and_round_trips_like_any_module() -> None:
    layer = nn.Conv2d(16, 24, 3, padding=1, stride=(2, 1), dilation=(1, 2))
    form = TensorizedTrain().fit(layer, WEIGHT_METRIC).build((3,)).eval()
    inputs = torch.randn(2, 16, 7, 7)
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    exported = torch.export.export(form, (inputs,), dynamic_shapes=shapes).module()
    for given in (inputs, torch.randn(5, 16, 7, 7)):
        torch.testing.assert_close(exported(given), form(given))
    other = TensorizedTrainConvolution(layer, channel_modes(layer, 2), 3).eval()
    other.load_state_dict(form.state_dict())
    assert torch.equal(other(inputs), form(inputs))


@pytest.mark.parametrize("modes", [0, -1, 2.0, "2", True])
def test_senseless_modes_are_refused(modes) -> None:
    with pytest.raises(ValueError, match="modes is an integer of at least 1"):
        TensorizedTrain(modes=modes)


def test_layers_without_channels_to_split_are_left() -> None:
    assert "only 1 channel" in TensorizedTrain().why_not(nn.Conv2d(1, 64, 3))
    assert "svd serves it" in TensorizedTrain().why_not(nn.Conv2d(64, 64, 1))
    assert TensorizedTrain().why_not(nn.Conv2d(3, 64, 3)) is None
