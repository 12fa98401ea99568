"""Kernels taken apart along their axes, with the channels of the outputs apart as well."""

from itertools import product

import pytest
import torch
from tensors import tensor_of, weight_of
from torch import nn

from rankfold.cost import count_layer_macs, count_parameters
from rankfold.layers import SeparableBottleneck
from rankfold.methods import WEIGHT_METRIC, Moments, Separable, Separable3

LAYERS = [nn.Conv2d(6, 8, (3, 2)), nn.Conv3d(4, 7, (2, 3, 2))]


def with_weight(layer: nn.Module) -> nn.Module:
    layer = layer.double()
    with torch.no_grad():
        layer.weight.copy_(tensor_of(layer.weight.shape))
    return layer


def metric(layer: nn.Module, inputs: str) -> Moments:
    length = layer.in_channels if inputs == "channels" else layer.weight[0].numel()
    return Moments(weight_of(length, seed=1), weight_of(layer.out_channels, seed=2))


def error(form: nn.Module, layer: nn.Module, moments: Moments) -> float:
    """Squared, relative to the weight's."""
    weight = layer.weight.detach()
    difference = form.to_dense().weight.detach() - weight
    return moments.squared_error(difference) / moments.squared_error(weight)


def test_the_geometry_goes_to_the_links_and_the_bias_to_the_last() -> None:
    layer = nn.Conv2d(8, 12, (3, 5), stride=(2, 3), padding=(1, 4), dilation=(2, 1))
    vertical, horizontal, last = SeparableBottleneck(layer, (4, 6))
    assert repr(vertical) == (
        "Conv2d(8, 4, kernel_size=(3, 1), stride=(2, 1), padding=(1, 0), dilation=(2, 1), "
        "bias=False)"
    )
    assert repr(horizontal) == (
        "Conv2d(4, 6, kernel_size=(1, 5), stride=(1, 3), padding=(0, 4), bias=False)"
    )
    assert repr(last) == "Conv2d(6, 12, kernel_size=(1, 1), stride=(1, 1))"


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("inputs", ["channels", "patches"])
def test_the_loss_bounds_the_error_of_every_pair_of_ranks(layer, inputs) -> None:
    layer = with_weight(layer)
    moments = metric(layer, inputs)
    family = Separable3(alignment=3).fit(layer, moments)
    for rank in family.ranks():
        reached = error(family.build(rank), layer, moments)
        assert reached <= family.loss(rank) * (1 + 1e-9) + 1e-12
        assert family.loss(rank) < 3 * reached + 1e-6


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("inputs", ["channels", "patches"])
def test_with_all_outputs_it_is_the_separable_layer(layer, inputs) -> None:
    layer = with_weight(layer)
    moments = metric(layer, inputs)
    family = Separable3(alignment=1).fit(layer, moments)
    separable = Separable(alignment=1).fit(layer, moments)
    outputs = layer.out_channels
    for rank in (2, 4, 7):
        assert family.loss((rank, outputs)) == pytest.approx(separable.loss((rank,)), rel=1e-9)
        assert error(family.build((rank, outputs)), layer, moments) == pytest.approx(
            error(separable.build((rank,)), layer, moments), rel=1e-3
        )


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_with_all_vertical_filters_it_is_the_low_rank_layer(layer) -> None:
    """Eckart and Young: the outputs' unfolding in the metric, cut off."""
    layer = with_weight(layer)
    moments = metric(layer, "patches")
    family = Separable3(alignment=1).fit(layer, moments)
    full, _ = max(family.ranks())
    root = torch.linalg.cholesky(moments.gradients).mT
    turned = root @ layer.weight.detach().flatten(1) @ torch.linalg.cholesky(moments.inputs)
    squares = torch.linalg.svdvals(turned).square()
    for rank in (1, 3, 6):
        tail = (squares[rank:].sum() / squares.sum()).item()
        assert family.loss((full, rank)) == pytest.approx(tail, rel=1e-6)
        assert error(family.build((full, rank)), layer, moments) == pytest.approx(tail, rel=1e-6)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("inputs", ["channels", "patches"])
def test_horizontal_filters_and_last_factor_are_at_a_minimum(layer, inputs) -> None:
    layer = with_weight(layer)
    moments = metric(layer, inputs)
    form = Separable3().fit(layer, moments).build((4, 3))
    least = error(form, layer, moments)
    for factor, seed in product(list(form)[1:], range(10)):
        step = tensor_of(factor.weight.shape, seed=seed)
        step *= 0.05 * factor.weight.detach().norm() / step.norm()
        steps = []
        for sign in (1, -1):
            with torch.no_grad():
                factor.weight.add_(sign * step)
                steps.append(error(form, layer, moments))
                factor.weight.sub_(sign * step)
        assert min(steps) > least
        assert steps[0] - least == pytest.approx(steps[1] - least, rel=1e-4)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_refinement_does_better_than_one_step_after_the_other(layer) -> None:
    """The separable layer, and the truncated SVD of its second convolution."""
    layer = with_weight(layer)
    first, second = Separable().fit(layer, WEIGHT_METRIC).build((4,))
    vertical = torch.linalg.qr(first.weight.detach().flatten(1).mT)
    weight = torch.einsum("qr,or...->oq...", vertical.R, second.weight.detach())
    u, values, vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    cut = (u[:, :3] * values[:3]) @ vh[:3]
    stepwise = SeparableBottleneck(layer, (4, layer.out_channels))
    with torch.no_grad():
        stepwise[0].weight.copy_(vertical.Q.mT.reshape(stepwise[0].weight.shape))
        stepwise[1].weight.copy_(cut.reshape(stepwise[1].weight.shape))
        stepwise[2].weight.copy_(torch.eye(layer.out_channels).reshape(stepwise[2].weight.shape))
    form = Separable3().fit(layer, WEIGHT_METRIC).build((4, 3))
    ours, theirs = (error(one, layer, WEIGHT_METRIC) for one in (form, stepwise))
    assert 0.5 * theirs < ours < theirs * (1 - 1e-4)


def test_costs_by_hand() -> None:
    form = SeparableBottleneck(nn.Conv2d(64, 128, 3, padding=1), (32, 48), device="meta")
    parameters = 64 * 3 * 32 + 32 * 3 * 48 + 48 * 128
    assert count_parameters(form) == parameters + 128
    assert count_layer_macs(form, [(1, 64, 10, 10)]) == parameters * 100


def test_exports_and_round_trips_like_any_module() -> None:
    layer = nn.Conv2d(8, 16, 3, padding=1)
    form = Separable3().fit(layer, WEIGHT_METRIC).build((8, 8)).eval()
    given = torch.randn(2, 8, 5, 5)
    exported = torch.export.export(form, (given,)).module()
    torch.testing.assert_close(exported(given), form(given))
    other = SeparableBottleneck(layer, (8, 8)).eval()
    other.load_state_dict(form.state_dict())
    assert torch.equal(other(given), form(given))
