"""Kernels taken apart along their axes: separable and asymmetric 3-D convolutions."""

import pytest
import torch
from geometry import relative
from tensors import tensor_of, weight_of
from torch import nn

from rankfold.cost import count_layer_macs, count_parameters
from rankfold.layers import SeparableConvolution
from rankfold.methods import WEIGHT_METRIC, Moments, Separable
from rankfold.methods.separated import separate

LAYERS = [nn.Conv2d(6, 8, (3, 2)), nn.Conv2d(4, 12, 3), nn.Conv3d(4, 5, (2, 3, 2))]


def with_weight(layer: nn.Module, seed: int = 0) -> nn.Module:
    layer = layer.double()
    with torch.no_grad():
        layer.weight.copy_(tensor_of(layer.weight.shape, seed=seed))
    return layer


def patches(layer: nn.Module, gradients: bool = True) -> Moments:
    return Moments(
        weight_of(layer.weight[0].numel(), seed=1),
        weight_of(layer.out_channels, seed=2) if gradients else None,
    )


def error(form: nn.Module, layer: nn.Module, moments: Moments) -> float:
    return moments.squared_error(form.to_dense().weight.detach() - layer.weight.detach())


def test_strides_paddings_and_dilations_go_to_the_link_of_their_axis() -> None:
    layer = nn.Conv2d(8, 12, (3, 5), stride=(2, 3), padding=(1, 4), dilation=(2, 1))
    vertical, horizontal = SeparableConvolution(layer, 4)
    assert repr(vertical) == (
        "Conv2d(8, 4, kernel_size=(3, 1), stride=(2, 1), padding=(1, 0), dilation=(2, 1), "
        "bias=False)"
    )
    assert repr(horizontal) == ("Conv2d(4, 12, kernel_size=(1, 5), stride=(1, 3), padding=(0, 4))")


@pytest.mark.parametrize(
    ("kernel", "first", "second"),
    [
        ((3, 3, 3), (3, 1, 1), (1, 3, 3)),
        ((1, 3, 3), (1, 3, 1), (1, 1, 3)),
        ((3, 1, 3), (3, 1, 1), (1, 1, 3)),
        ((3, 3, 1), (3, 1, 1), (1, 3, 1)),
    ],
)
def test_of_three_axes_the_first_that_is_longer_than_1_stands_alone(kernel, first, second) -> None:
    layer = nn.Conv3d(2, 3, kernel, stride=(2, 1, 3))
    form = SeparableConvolution(layer, 2)
    assert [link.kernel_size for link in form] == [first, second]
    given = torch.randn(1, 2, 7, 7, 7)
    assert form(given).shape == layer(given).shape
    assert repr(form.to_dense()) == repr(layer)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("known", ["", "inputs", "gradients", "both"])
def test_in_the_metric_of_channels_no_random_start_finds_a_better_pair(layer, known) -> None:
    """Alternating least squares with both steps in closed form, from elsewhere."""
    layer = with_weight(layer)
    outputs, inputs = layer.weight.shape[:2]
    moments = Moments(
        weight_of(inputs, seed=1) if known in ("inputs", "both") else None,
        weight_of(outputs, seed=2) if known in ("gradients", "both") else None,
    )
    separated = separate(layer, moments)
    form = Separable(alignment=1).fit(layer, moments).build((3,))
    vertical = tensor_of((3, *separated.weight.shape[1:3]), seed=3)
    columns = torch.eye(inputs).double() if moments.inputs is None else moments.inputs
    gradients = torch.eye(outputs).double() if moments.gradients is None else moments.gradients
    errors = []
    for _ in range(300):
        seen = torch.einsum("ric,ij->rjc", vertical, columns)
        gram = torch.einsum("ric,sic->rs", seen, vertical)
        crossed = torch.einsum("oicw,ric->orw", separated.weight, seen)
        horizontal = torch.linalg.solve(gram, crossed)
        seen = torch.einsum("orw,op->prw", horizontal, gradients)
        gram = torch.einsum("orw,osw->rs", seen, horizontal)
        crossed = torch.einsum("oicw,orw->ric", separated.weight, seen)
        vertical = torch.linalg.solve(gram, crossed.flatten(1)).reshape(vertical.shape)
        product = torch.einsum("ric,orw->oicw", vertical, horizontal)
        errors.append(moments.squared_error(product - separated.weight))
    least = error(form, layer, moments)
    assert errors[0] > 1.05 * least
    assert errors[-1] == pytest.approx(least, rel=1e-3)
    assert errors[-1] >= least * (1 - 1e-9)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_both_factors_have_the_same_norms(layer) -> None:
    """The singular values are split evenly (Tai et al. 2016)."""
    layer = with_weight(layer)
    first, last = Separable().fit(layer, WEIGHT_METRIC).build((4,))
    matrix = separate(layer, WEIGHT_METRIC).weight.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)
    expected = torch.linalg.svdvals(matrix)[:4].sqrt()
    torch.testing.assert_close(first.weight.detach().flatten(1).norm(dim=1), expected)
    norms = last.weight.detach().movedim(1, 0).flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, expected)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("gradients", [True, False])
def test_refinement_lowers_the_error_below_the_loss(layer, gradients) -> None:
    layer = with_weight(layer)
    moments = patches(layer, gradients)
    family = Separable(alignment=1).fit(layer, moments)
    whole = moments.squared_error(layer.weight.detach())
    for rank in (1, 3, 5):
        reached = error(family.build((rank,)), layer, moments) / whole
        assert reached < family.loss((rank,)) * (1 - 1e-4)
        assert reached > 0.3 * family.loss((rank,))


def test_the_metric_of_patches_sees_what_that_of_channels_cannot() -> None:
    """Inputs that are the same in the middle and on the right of each row of a patch."""
    layer = with_weight(nn.Conv2d(4, 6, 3))
    samples = tensor_of((200, 4, 3, 3), seed=5)
    samples[..., 2] = samples[..., 1]
    rows = samples.flatten(1)
    moments = Moments(rows.mT @ rows / 200)
    by_patches = Separable(alignment=1).fit(layer, moments)
    by_channels = Separable(alignment=1).fit(layer, moments.of_channels(4))
    errors = [error(family.build((6,)), layer, moments) for family in (by_patches, by_channels)]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.Conv1d(16, 16, 5), "a kernel of 5 is longer than 1 along one axis alone"),
        (nn.Conv2d(16, 16, 1), "a kernel of 1x1 has no spatial modes"),
        (nn.Conv2d(16, 16, (1, 5)), "a kernel of 1x5 is longer than 1 along one axis"),
        (nn.Conv3d(16, 16, (3, 1, 1)), "a kernel of 3x1x1 is longer than 1 along one"),
        (nn.Linear(16, 16), "no factorization for Linear layers"),
    ],
)
def test_what_has_no_second_axis_is_left_to_others(layer, words) -> None:
    assert words in Separable().why_not(layer)


def test_costs_by_hand() -> None:
    """Jaderberg et al. 2014: r (in k + out k) products per position, without stride."""
    form = SeparableConvolution(nn.Conv2d(64, 128, 3, padding=1), 32, device="meta")
    assert count_parameters(form) == 32 * (64 * 3 + 128 * 3) + 128
    assert count_layer_macs(form, [(1, 64, 10, 10)]) == 32 * (64 * 3 + 128 * 3) * 100


def test_exports_and_round_trips_like_any_module() -> None:
    layer = nn.Conv2d(8, 16, 3, padding=1)
    form = Separable().fit(layer, WEIGHT_METRIC).build((8,)).eval()
    given = torch.randn(2, 8, 5, 5)
    exported = torch.export.export(form, (given,)).module()
    torch.testing.assert_close(exported(given), form(given))
    other = SeparableConvolution(layer, 8).eval()
    other.load_state_dict(form.state_dict())
    assert torch.equal(other(given), form(given))
    assert relative(other.to_dense().weight, form.to_dense().weight) == 0
