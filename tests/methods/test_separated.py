"""A kernel as vertical and horizontal filters: what they miss, and what improves them."""

import pytest
import torch
from tensors import tensor_of, weight_of
from torch import nn

from rankfold.methods import WEIGHT_METRIC, Moments
from rankfold.methods.separated import (
    Features,
    Separated,
    balanced,
    kernel_of,
    separate,
    squared_errors,
)

LAYERS = [nn.Conv2d(6, 8, (3, 2)), nn.Conv2d(4, 12, 3), nn.Conv3d(4, 5, (2, 3, 2))]
in_every_metric = pytest.mark.parametrize("known", ["nothing", "channels", "patches", "gradients"])


def with_weight(layer: nn.Module) -> nn.Module:
    layer = layer.double()
    with torch.no_grad():
        layer.weight.copy_(tensor_of(layer.weight.shape))
    return layer


def separated_in(layer: nn.Module, known: str) -> Separated:
    layer = with_weight(layer)
    gradients = weight_of(layer.out_channels, seed=2)
    moments = {
        "nothing": WEIGHT_METRIC,
        "channels": Moments(weight_of(layer.in_channels, seed=1), gradients),
        "patches": Moments(weight_of(layer.weight[0].numel(), seed=1)),
        "gradients": Moments(weight_of(layer.weight[0].numel(), seed=1), gradients),
    }[known]
    return separate(layer, moments)


@in_every_metric
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_features_are_what_the_filters_make_of_a_patch(layer, known) -> None:
    separated = separated_in(layer, known)
    weight, moments = separated.weight, separated.moments
    features, horizontal = (
        separated.features(separated.vertical[:3]),
        tensor_of((len(weight), 3, weight.shape[-1]), seed=5),
    )
    kernel = kernel_of(features.vertical, horizontal)
    seen = moments.times_inputs(kernel)
    torch.testing.assert_close(features.response(horizontal).flatten(1), seen)
    flat = horizontal.flatten(1)
    torch.testing.assert_close(flat @ features.gram @ flat.mT, seen @ kernel.flatten(1).mT)
    torch.testing.assert_close(features.moment_with(weight) @ flat.mT, weight.flatten(1) @ seen.mT)


@in_every_metric
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_the_error_is_that_of_the_kernel(layer, known) -> None:
    separated = separated_in(layer, known)
    weight, moments = separated.weight, separated.moments
    horizontal = tensor_of((len(weight), 3, weight.shape[-1]), seed=5)
    filters = separated.filters(separated.features(separated.vertical[:3]), horizontal)
    difference = weight - kernel_of(filters.vertical, horizontal)
    expected = moments.squared_error(difference)
    assert separated.squared_error(filters) == pytest.approx(expected, rel=1e-9)
    assert separated.whole == pytest.approx(moments.squared_error(weight), rel=1e-12)


@in_every_metric
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_better_vertical_filters_lower_the_error(layer, known) -> None:
    """From any filters, and not from those that nothing better can be had of."""
    separated = separated_in(layer, known)
    vertical = tensor_of((3, *separated.weight.shape[1:3]), seed=4)
    horizontal = tensor_of((len(separated.weight), 3, separated.weight.shape[-1]), seed=5)

    def with_vertical(vertical: torch.Tensor) -> float:
        found = separated.filters(separated.features(vertical), horizontal)
        return separated.squared_error(found)

    start = separated.filters(separated.features(vertical), horizontal)
    better = separated.better_vertical(start)
    assert with_vertical(better) < 0.9 * separated.squared_error(start)
    for _ in range(20):
        better = separated.better_vertical(
            separated.filters(separated.features(better), horizontal)
        )
    least = with_vertical(better)
    for step in (1e-3, -1e-3):
        assert with_vertical(better + step * vertical) >= least * (1 - 1e-9)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("gradients", [True, False])
def test_horizontal_filters_are_best_in_the_metric_of_patches(layer, gradients) -> None:
    """Against least squares on the samples whose moment the metric is."""
    layer = with_weight(layer)
    rows = tensor_of((400, layer.weight[0].numel()), seed=4)
    rows[:, 1:] += rows[:, :-1]
    gradients = weight_of(layer.out_channels, seed=2) if gradients else None
    moments = Moments(rows.mT @ rows, gradients)
    separated = separate(layer, moments)
    weight, vertical = separated.weight, separated.vertical[:3]
    _, inputs, column, places = weight.shape
    features = Features.of(vertical, places, moments)
    found = features.best_horizontal(weight, separated.horizontal[:, :3])
    features = torch.einsum(
        "nicw,ric->nrw", rows.reshape(-1, inputs, column, places), vertical
    ).flatten(1)
    expected = torch.linalg.lstsq(features, rows @ weight.flatten(1).mT).solution.mT
    torch.testing.assert_close(found.flatten(1), expected, rtol=1e-6, atol=1e-6)
    rest = torch.einsum("ric,orw->oicw", vertical, found) - weight
    assert squared_errors(separated)[2].item() == pytest.approx(
        moments.squared_error(rest), rel=1e-6
    )


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_what_is_refined_is_refined_once(layer) -> None:
    separated = separated_in(layer, "gradients")
    assert separated.refined(3) is separated.refined(3)


def test_balanced_terms_have_norms_alike_and_the_same_product() -> None:
    vertical, horizontal = tensor_of((3, 4, 2)), tensor_of((5, 3, 2), seed=1)
    both = balanced(vertical, horizontal)
    torch.testing.assert_close(kernel_of(*both), kernel_of(vertical, horizontal))
    torch.testing.assert_close(
        both[0].flatten(1).norm(dim=1), both[1].movedim(1, 0).flatten(1).norm(dim=1)
    )
