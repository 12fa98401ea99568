"""Filters that are products of vectors, one along each axis."""

import copy

import pytest
import torch
from geometry import relative
from tensors import tensor_of, weight_of
from torch import nn

from rankfold.cost import count_layer_macs, count_parameters
from rankfold.decompose import rank_one_terms
from rankfold.layers import FlattenedConvolution
from rankfold.methods import WEIGHT_METRIC, Flattened, Moments

LAYERS = [nn.Conv1d(5, 6, 4), nn.Conv2d(5, 6, (3, 2)), nn.Conv3d(4, 5, (2, 3, 2))]


def with_weight(layer: nn.Module) -> nn.Module:
    layer = layer.double()
    with torch.no_grad():
        layer.weight.copy_(tensor_of(layer.weight.shape))
    return layer


def error(form: nn.Module, layer: nn.Module, moments: Moments) -> float:
    """Squared, relative to the weight's."""
    weight = layer.weight.detach()
    difference = form.to_dense().weight.detach() - weight
    return moments.squared_error(difference) / moments.squared_error(weight)


def metric(layer: nn.Module, inputs: str, gradients: bool = True) -> Moments:
    length = layer.in_channels if inputs == "channels" else layer.weight[0].numel()
    return Moments(
        weight_of(length, seed=1), weight_of(layer.out_channels, seed=2) if gradients else None
    )


def test_the_geometry_goes_to_the_depthwise_links_and_the_bias_to_the_last() -> None:
    layer = nn.Conv2d(8, 12, (3, 5), stride=(2, 3), padding=(1, 4), dilation=(2, 1))
    lateral, vertical, horizontal = FlattenedConvolution(layer)
    assert repr(lateral) == "Conv2d(8, 12, kernel_size=(1, 1), stride=(1, 1), bias=False)"
    assert repr(vertical) == (
        "Conv2d(12, 12, kernel_size=(3, 1), stride=(2, 1), padding=(1, 0), dilation=(2, 1), "
        "groups=12, bias=False)"
    )
    assert repr(horizontal) == (
        "Conv2d(12, 12, kernel_size=(1, 5), stride=(1, 3), padding=(0, 4), groups=12)"
    )


@pytest.mark.parametrize(
    ("layer", "kernels"),
    [
        (nn.Conv1d(4, 6, 5), [(1,), (5,)]),
        (nn.Conv3d(4, 6, 3), [(1, 1, 1), (3, 1, 1), (1, 3, 1), (1, 1, 3)]),
        (nn.Conv3d(4, 6, (1, 3, 2)), [(1, 1, 1), (1, 3, 1), (1, 1, 2)]),
    ],
    ids=str,
)
def test_one_link_for_each_axis_that_is_longer_than_1(layer, kernels) -> None:
    form = FlattenedConvolution(layer)
    assert [link.kernel_size for link in form] == kernels
    assert repr(form.to_dense()) == repr(layer)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("inputs", ["", "channels", "patches"])
def test_a_flattened_layer_is_recovered(layer, inputs) -> None:
    layer = with_weight(layer)
    moments = metric(layer, inputs) if inputs else WEIGHT_METRIC
    torch.manual_seed(0)
    flattened = FlattenedConvolution(layer).to_dense()
    family = Flattened().fit(flattened, moments)
    assert family.loss((1,)) < 1e-9
    found = family.build((1,)).to_dense().weight.detach()
    assert relative(found, flattened.weight.detach()) < 1e-6


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_filters_are_as_good_as_one_by_one(layer) -> None:
    """Beside the greedy decomposition of each filter alone, which may find another optimum."""
    layer = with_weight(layer)
    found = Flattened().fit(layer, WEIGHT_METRIC).build((1,)).to_dense().weight.detach()
    ours, theirs = [], []
    for filters, weight in zip(found, layer.weight.detach(), strict=True):
        ours.append(relative(filters, weight))
        theirs.append(rank_one_terms(weight, 1).relative_error(weight))
        assert ours[-1] < 1.1 * theirs[-1]
    assert sum(ours) < 1.02 * sum(theirs)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("inputs", ["channels", "patches"])
def test_the_loss_is_the_error_and_the_metric_pays(layer, inputs, gradients) -> None:
    layer = with_weight(layer)
    moments = metric(layer, inputs, gradients)
    family = Flattened().fit(layer, moments)
    reached = error(family.build((1,)), layer, moments)
    assert family.loss((1,)) == pytest.approx(reached, rel=1e-9)
    assert reached < 0.95 * error(Flattened().fit(layer, WEIGHT_METRIC).build((1,)), layer, moments)


def test_the_norms_of_the_vectors_of_a_filter_are_the_same() -> None:
    form = Flattened().fit(with_weight(nn.Conv2d(5, 6, (3, 2))), WEIGHT_METRIC).build((1,))
    norms = torch.stack([link.weight.detach().flatten(1).norm(dim=1) for link in form])
    torch.testing.assert_close(norms, norms[:1].expand_as(norms))


def test_initial_values_keep_the_variance_of_a_dense_layer() -> None:
    """Through six layers; torch's own values for every link would be 27 times less in each."""
    torch.manual_seed(0)
    dense = [nn.Conv2d(64, 64, 3, padding=1, padding_mode="circular", bias=False) for _ in range(3)]
    flattened = [FlattenedConvolution(layer) for layer in dense]
    given = torch.randn(8, 64, 16, 16)
    with torch.no_grad():
        ratio = nn.Sequential(*flattened)(given).var() / nn.Sequential(*dense)(given).var()
    assert 0.5 < ratio.item() < 2


def test_it_can_be_trained_from_scratch() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        FlattenedConvolution(nn.Conv2d(1, 16, 3, padding=1)),
        nn.ReLU(),
        FlattenedConvolution(nn.Conv2d(16, 2, 3, padding=1)),
    )
    given = torch.randn(16, 1, 8, 8)
    wanted = torch.cat([given.roll(1, 2), given.roll(1, 3)], dim=1)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = (network(given) - wanted)[..., 1:, 1:].square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.Conv2d(16, 16, 1), "a kernel of 1x1 has no spatial modes"),
        (nn.Conv2d(16, 16, 3, groups=2), "groups=2"),
        (nn.Linear(16, 16), "no factorization for Linear layers"),
    ],
)
def test_what_is_flat_already_is_left_to_others(layer, words) -> None:
    assert words in Flattened().why_not(layer)


def test_costs_by_hand() -> None:
    form = FlattenedConvolution(nn.Conv2d(64, 128, 3, padding=1), device="meta")
    parameters = 64 * 128 + 128 * 3 + 128 * 3
    assert count_parameters(form) == parameters + 128
    assert count_layer_macs(form, [(1, 64, 10, 10)]) == parameters * 100


def test_exports_and_round_trips_like_any_module() -> None:
    layer = nn.Conv2d(8, 16, 3, padding=1)
    form = FlattenedConvolution(layer).eval()
    given = torch.randn(2, 8, 5, 5)
    exported = torch.export.export(copy.deepcopy(form), (given,)).module()
    torch.testing.assert_close(exported(given), form(given))
    other = FlattenedConvolution(layer).eval()
    other.load_state_dict(form.state_dict())
    assert torch.equal(other(given), form(given))
