import math

import pytest
import torch
from geometry import relative
from tensors import tensor_of, weight_of
from torch import nn

from rankfold.cost import count_layer_macs, count_parameters
from rankfold.decompose import tensor_train
from rankfold.layers import TensorTrainConvolution
from rankfold.methods import METHODS, WEIGHT_METRIC, Moments

METHOD = METHODS["tensor-train"]()
LAYERS = [nn.Conv2d(10, 12, 3), nn.Conv3d(8, 9, (2, 1, 3))]


def random_layer(layer: nn.Module) -> nn.Module:
    layer = layer.double()
    with torch.no_grad():
        layer.weight.copy_(tensor_of(layer.weight.shape))
    return layer


def metric(layer: nn.Module, of: str) -> Moments:
    length = {"patches": layer.weight[0].numel(), "channels": layer.in_channels}[of]
    return Moments(weight_of(length, 1), weight_of(layer.out_channels, 2))


def error_in(moments: Moments, form: nn.Module, layer: nn.Module) -> float:
    weight = layer.weight.detach()
    difference = form.to_dense().weight.detach() - weight
    return moments.squared_error(difference) / moments.squared_error(weight)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_it_is_the_tensor_train_of_the_kernel(layer) -> None:
    layer = random_layer(layer)
    lengths = [layer.in_channels, *(n for n in layer.kernel_size if n > 1), layer.out_channels]
    tensor = layer.weight.detach().movedim(0, -1).reshape(lengths)
    form = METHOD.fit(layer, WEIGHT_METRIC).build((4, 6, 5))
    found = form.to_dense().weight.movedim(0, -1).reshape(lengths)
    torch.testing.assert_close(found.detach(), tensor_train(tensor, (4, 6, 5)).to_tensor())


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("of", ["", "channels", "patches"])
def test_a_kernel_of_these_ranks_is_recovered(layer, of) -> None:
    form = TensorTrainConvolution(layer.double(), (3, 5, 4))
    with torch.no_grad():
        for seed, one in enumerate(form):
            one.weight.copy_(tensor_of(one.weight.shape, seed=seed))
    exact = form.to_dense()
    moments = metric(exact, of) if of else WEIGHT_METRIC
    family = METHOD.fit(exact, moments)
    assert relative(family.build((3, 5, 4)).to_dense().weight, exact.weight) < 1e-7
    assert relative(family.build((3, 4, 4)).to_dense().weight, exact.weight) > 1e-2


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("of", ["", "channels"])
def test_where_one_rank_is_cut_the_loss_is_the_error_and_elsewhere_no_less(layer, of) -> None:
    layer = random_layer(layer)
    moments = metric(layer, of) if of else WEIGHT_METRIC
    family = METHOD.fit(layer, moments)
    full = max(family.ranks())
    for entry in range(len(full)):
        rank = (*full[:entry], 4, *full[entry + 1 :])
        error = error_in(moments, family.build(rank), layer)
        assert 0.01 < error == pytest.approx(family.loss(rank), rel=1e-6)
    for rank in [(4, 4, 4), (8, 8, 8), (1, 1, 1), (2, 8, 4)]:
        assert error_in(moments, family.build(rank), layer) <= family.loss(rank) <= 1 + 1e-9


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_the_outputs_are_best_in_the_metric_of_patches(layer) -> None:
    layer = random_layer(layer)
    moments = metric(layer, "patches")
    family = METHOD.fit(layer, moments)
    form = family.build((6, 8, 6))
    last = form[-1].weight.detach().clone()
    least = error_in(moments, form, layer)
    for seed in range(10):
        step = 0.1 * tensor_of(last.shape, seed=seed) * last.norm() / last.numel() ** 0.5
        errors = []
        for sign in (1, -1):
            with torch.no_grad():
                form[-1].weight.copy_(last + sign * step)
            errors.append(error_in(moments, form, layer))
        assert min(errors) > least
        assert errors[0] - least == pytest.approx(errors[1] - least, rel=1e-4)
    for rank in [(4, 8, 4), (8, 8, 8), (2, 6, 8)]:
        error = error_in(moments, family.build(rank), layer)
        assert error <= 1.05 * family.loss(rank) <= 4 * error


def test_each_axis_has_its_stride_padding_and_dilation() -> None:
    layer = nn.Conv2d(8, 6, (5, 3), stride=(2, 1), padding=(0, 2), dilation=(1, 2))
    first, vertical, horizontal, last = METHOD.skeleton(layer, (4, 5, 6))
    assert [one.out_channels for one in (first, vertical, horizontal, last)] == [4, 5, 6, 6]
    assert vertical.kernel_size == (5, 1) and horizontal.kernel_size == (1, 3)
    assert vertical.stride == (2, 1) and horizontal.stride == (1, 1)
    assert vertical.padding == (0, 0) and horizontal.padding == (0, 2)
    assert vertical.dilation == (1, 1) and horizontal.dilation == (1, 2)


def test_costs_by_hand() -> None:
    layer = nn.Conv2d(8, 6, 3, stride=2, padding=1, bias=False)
    form = METHOD.skeleton(layer, (4, 5, 6))
    assert count_parameters(form) == 8 * 4 + 3 * 4 * 5 + 3 * 5 * 6 + 6 * 6
    counted = count_layer_macs(form, [(1, 8, 10, 10)])  # 5x5 outputs
    assert counted == 8 * 4 * 100 + 3 * 4 * 5 * 50 + (3 * 5 * 6 + 6 * 6) * 25


def test_compiles_exports_and_round_trips_like_any_module() -> None:
    layer = nn.Conv2d(8, 16, 3, padding=1)
    form = METHOD.fit(layer, WEIGHT_METRIC).build((4, 8, 8)).eval()
    inputs = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(torch.export.export(form, (inputs,)).module()(inputs), form(inputs))
    other = TensorTrainConvolution(layer, (4, 8, 8)).eval()
    other.load_state_dict(form.state_dict())
    assert torch.equal(other(inputs), form(inputs))


def test_factors_have_equal_norms() -> None:
    form = METHOD.fit(random_layer(nn.Conv2d(10, 12, 3)), WEIGHT_METRIC).build((4, 6, 5))
    norms = [one.weight.norm().item() for one in form]
    assert math.isclose(min(norms), max(norms), rel_tol=1e-6)


def test_along_one_axis_it_would_be_tucker2() -> None:
    assert "along one axis alone: tucker2" in METHOD.why_not(nn.Conv2d(16, 16, (3, 1)))
    assert "along one axis alone: tucker2" in METHOD.why_not(nn.Conv1d(16, 16, 3))
    assert METHOD.why_not(nn.Conv2d(16, 16, 3)) is None
