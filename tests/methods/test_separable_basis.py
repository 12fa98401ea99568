"""A few separable filters for each input channel, or for all of them."""

import json
from dataclasses import asdict
from itertools import pairwise

import pytest
import torch
from geometry import relative
from tensors import tensor_of, weight_of
from torch import nn

from rankfold.cost import count_layer_macs, count_parameters
from rankfold.layers import SeparableBasisConvolution
from rankfold.methods import WEIGHT_METRIC, Moments, SeparableBasis

LAYERS = [nn.Conv2d(4, 12, 3), nn.Conv3d(3, 10, (2, 3, 1), bias=False)]


def with_weight(layer: nn.Module, weight: torch.Tensor | None = None) -> nn.Module:
    layer = layer.double()
    with torch.no_grad():
        layer.weight.copy_(tensor_of(layer.weight.shape) if weight is None else weight)
    return layer


def error(form: nn.Module, layer: nn.Module, moments: Moments) -> float:
    """Squared, relative to the weight's."""
    weight = layer.weight.detach()
    difference = form.to_dense().weight.detach() - weight
    return moments.squared_error(difference) / moments.squared_error(weight)


def metric(layer: nn.Module, inputs: str) -> Moments:
    if inputs == "":
        return WEIGHT_METRIC
    length = layer.in_channels if inputs == "channels" else layer.weight[0].numel()
    return Moments(weight_of(length, seed=1), weight_of(layer.out_channels, seed=2))


def test_the_geometry_goes_to_the_depthwise_links() -> None:
    layer = nn.Conv2d(8, 12, (3, 5), stride=(2, 3), padding=(1, 4), dilation=(2, 1))
    vertical, horizontal, last = SeparableBasisConvolution(layer, 2)
    assert repr(vertical) == (
        "Conv2d(8, 16, kernel_size=(3, 1), stride=(2, 1), padding=(1, 0), dilation=(2, 1), "
        "groups=8, bias=False)"
    )
    assert repr(horizontal) == (
        "Conv2d(16, 16, kernel_size=(1, 5), stride=(1, 3), padding=(0, 4), groups=16, bias=False)"
    )
    assert repr(last) == "Conv2d(16, 12, kernel_size=(1, 1), stride=(1, 1))"


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("inputs", ["", "channels", "patches"])
def test_one_filter_for_each_channel_is_recovered(inputs, shared) -> None:
    generator = torch.Generator().manual_seed(0)
    column, row = (torch.randn(1 if shared else 5, 3, generator=generator) for _ in range(2))
    mixed = torch.randn(12, 5, generator=generator)
    weight = mixed[..., None, None] * (column[..., None] * row[:, None])
    layer = with_weight(nn.Conv2d(5, 12, 3), weight)
    family = SeparableBasis(shared=shared).fit(layer, metric(layer, inputs))
    assert family.loss((1,)) < 1e-9
    form = family.build((1,))
    assert relative(form.to_dense().weight.detach(), layer.weight.detach()) < 1e-6


def test_where_one_channel_has_one_filter_it_is_found_among_others() -> None:
    """Each channel's filters are its own."""
    layer = with_weight(nn.Conv2d(2, 6, 3))
    with torch.no_grad():
        layer.weight[:, 0] = tensor_of((6, 1, 1)) * torch.ones(3, 3)
    form = SeparableBasis().fit(layer, WEIGHT_METRIC).build((1,))
    dense = form.to_dense().weight.detach()
    assert relative(dense[:, 0], layer.weight[:, 0].detach()) < 1e-9
    assert relative(dense[:, 1], layer.weight[:, 1].detach()) > 0.1


def test_the_first_filter_is_the_best_of_many() -> None:
    """Of one input channel: against random starts of alternating least squares."""
    layer = with_weight(nn.Conv2d(1, 6, (3, 4)))
    tensor = layer.weight.detach()[:, 0]
    family = SeparableBasis().fit(layer, WEIGHT_METRIC)
    errors = []
    for seed in range(10):
        row = tensor_of((4,), seed=seed)
        for _ in range(100):
            seen = tensor @ (row / row.norm())
            column = torch.linalg.svd(seen).Vh[0]
            seen = torch.einsum("ohw,h->ow", tensor, column)
            row = torch.linalg.svd(seen).Vh[0]
        kept = torch.einsum("ohw,h,w->o", tensor, column, row).square().sum()
        errors.append(1 - (kept / tensor.square().sum()).item())
    assert max(errors) > min(errors) + 1e-3  # there are local optima
    assert family.loss((1,)) <= min(errors) + 1e-6


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("inputs", ["", "channels", "patches"])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_the_loss_bounds_the_error_and_refinement_lowers_it(layer, inputs, shared) -> None:
    layer = with_weight(layer)
    moments = metric(layer, inputs)
    family = SeparableBasis(shared=shared).fit(layer, moments)
    ranks = list(family.ranks())
    errors = [error(family.build(rank), layer, moments) for rank in ranks]
    losses = [family.loss(rank) for rank in ranks]
    for reached, loss in zip(errors, losses, strict=True):
        assert 0.3 * loss - 1e-9 <= reached <= loss * (1 + 1e-9) + 1e-9
    assert sum(errors) < sum(losses) * (1 - 1e-3)
    assert all(later < earlier for earlier, later in pairwise(losses))


@pytest.mark.parametrize("inputs", ["", "channels", "patches"])
def test_the_last_factor_is_at_a_minimum(inputs) -> None:
    layer = with_weight(nn.Conv2d(4, 12, 3))
    moments = metric(layer, inputs)
    form = SeparableBasis().fit(layer, moments).build((2,))
    least = error(form, layer, moments)
    factor = form[-1].weight
    for seed in range(10):
        step = tensor_of(factor.shape, seed=seed)
        step *= 0.05 * factor.detach().norm() / step.norm()
        steps = []
        for sign in (1, -1):
            with torch.no_grad():
                factor.add_(sign * step)
                steps.append(error(form, layer, moments))
                factor.sub_(sign * step)
        assert min(steps) > least
        assert steps[0] - least == pytest.approx(steps[1] - least, rel=1e-4)


def test_a_shared_bank_is_the_same_for_all_channels_and_worse_than_one_for_each() -> None:
    """Rigamonti et al. 2013 beside Jaderberg et al. 2014."""
    layer = with_weight(nn.Conv2d(4, 12, 3))
    shared, own = (SeparableBasis(shared=s).fit(layer, WEIGHT_METRIC) for s in (True, False))
    form = shared.build((3,))
    for link in list(form)[:2]:
        bank = link.weight.detach().unflatten(0, (4, 3))
        assert torch.equal(bank, bank[:1].expand_as(bank))
        assert not torch.equal(bank[0, 0], bank[0, 1])
    assert [f.weight.shape for f in form] == [f.weight.shape for f in own.build((3,))]
    assert 1.2 * own.loss((3,)) < shared.loss((3,)) < 4 * own.loss((3,))


def test_shared_is_a_setting() -> None:
    method = SeparableBasis(shared=True)
    assert SeparableBasis(**json.loads(json.dumps(asdict(method)))) == method
    with pytest.raises(ValueError, match="shared is true or false"):
        SeparableBasis(shared="yes")


def test_costs_by_hand() -> None:
    form = SeparableBasisConvolution(nn.Conv2d(64, 128, 3, padding=1), 2, device="meta")
    parameters = 128 * 3 + 128 * 3 + 128 * 128
    assert count_parameters(form) == parameters + 128
    assert count_layer_macs(form, [(1, 64, 10, 10)]) == parameters * 100


def test_exports_and_round_trips_like_any_module() -> None:
    layer = nn.Conv2d(8, 16, 3, padding=1)
    form = SeparableBasis().fit(layer, WEIGHT_METRIC).build((2,)).eval()
    given = torch.randn(2, 8, 5, 5)
    exported = torch.export.export(form, (given,)).module()
    torch.testing.assert_close(exported(given), form(given))
    other = SeparableBasisConvolution(layer, 2).eval()
    other.load_state_dict(form.state_dict())
    assert torch.equal(other(given), form(given))
