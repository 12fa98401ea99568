"""Rings of inputs, places and outputs."""

import copy

import pytest
import torch
from geometry import relative
from tensors import tensor_of, weight_of
from torch import nn

from rankfold.cost import count_layer_macs, count_parameters
from rankfold.decompose import tensor_ring
from rankfold.demo import make_model
from rankfold.errors import RankError
from rankfold.layers import TensorRingConvolution
from rankfold.methods import METHODS, WEIGHT_METRIC, Moments, TensorRing

LAYERS = [nn.Conv2d(16, 12, 3), nn.Conv1d(14, 18, 5)]


def with_ring(layer: nn.Module, slices: int, rank_out: int, rank_in: int) -> nn.Module:
    """A layer that is such a ring, of random cores."""
    layer = layer.double()
    form = TensorRingConvolution(layer, (slices, rank_out, rank_in))
    for place, one in enumerate((form[0], form[1].layer, form[2])):
        one.weight = nn.Parameter(tensor_of(one.weight.shape, seed=place))
    return form.to_dense()


@pytest.mark.parametrize(
    ("layer", "rank"), [(LAYERS[0], (4, 4)), (LAYERS[0], (8, 8)), (LAYERS[1], (8, 8))], ids=str
)
def test_slices_with_one_core_are_recovered(layer, rank) -> None:
    exact = with_ring(layer, 2, 4, 4)
    family = TensorRing(alignment=4, slices=2).fit(exact, WEIGHT_METRIC)
    assert relative(family.build(rank).to_dense().weight, exact.weight) < 1e-3
    one = TensorRing(alignment=4, slices=1).fit(exact, WEIGHT_METRIC)
    assert relative(one.build((4, 4)).to_dense().weight, exact.weight) > 0.3


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_the_kernel_is_a_ring(layer) -> None:
    """Beside the decomposition's own form."""
    form = TensorRingConvolution(layer.double(), (3, 2, 4))
    weights = [form[0].weight, form[1].layer.weight.flatten(2), form[2].weight]
    into = weights[0].detach().flatten(1).unflatten(0, (3, 4)).movedim(2, 1)  # (s, in, r_in)
    core = weights[1].detach().permute(1, 2, 0)  # (r_in, places, r_out)
    out = weights[2].detach().flatten(1).unflatten(1, (3, 2)).permute(2, 0, 1)  # (r_out, out, s)
    ring = tensor_ring(torch.zeros(2, 2, 2), 1)
    ring = type(ring)((into, core, out))
    expected = ring.to_tensor().permute(2, 0, 1).reshape(layer.weight.shape)
    torch.testing.assert_close(form.to_dense().weight.detach(), expected)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_full_ranks_are_any_kernel_and_one_slice_is_tucker2(layer) -> None:
    layer = layer.double()
    full = (layer.out_channels, layer.in_channels)
    for slices in (1, 3):
        family = TensorRing(alignment=4, slices=slices).fit(layer, WEIGHT_METRIC)
        assert max(family.ranks()) == full
        assert relative(family.build(full).to_dense().weight, layer.weight) < 1e-12
    family = TensorRing(alignment=4, slices=1).fit(layer, WEIGHT_METRIC)
    tucker2 = METHODS["tucker2"](alignment=4).fit(layer, WEIGHT_METRIC).build((4, 4))
    bound = relative(tucker2.to_dense().weight, layer.weight)
    found = relative(family.build((4, 4)).to_dense().weight, layer.weight)
    assert found == pytest.approx(bound, rel=0.01)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_it_comes_near_alternating_least_squares_with_exact_cores(layer) -> None:
    """That of `tensor_ring`, whose equations for a core grow with its ranks' fourth power.

    On average: each of the two finds an optimum of its own.
    """
    ratios = []
    for seed in range(4):
        layer = copy.deepcopy(layer).double()
        layer.weight = nn.Parameter(tensor_of(layer.weight.shape, seed=seed))
        tensor = layer.weight.detach().flatten(2).permute(1, 2, 0)
        peer = tensor_ring(tensor, (2, 4, 4), starts=3).relative_error(tensor)
        form = TensorRing(alignment=4, slices=2).fit(layer, WEIGHT_METRIC).build((4, 4))
        ratios.append(relative(form.to_dense().weight, layer.weight) / peer)
    assert sum(ratios) / len(ratios) < 1.03


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_the_outputs_are_best_in_the_metric_of_patches(layer) -> None:
    """A step to either side costs the same, for the error is quadratic in them."""
    layer = layer.double()
    weight = layer.weight.detach()
    moments = Moments(weight_of(weight[0].numel(), 1), weight_of(len(weight), 2))
    form = TensorRing(alignment=4).fit(layer, moments).build((4, 4))
    last = form[-1].weight.detach().clone()

    def error(outputs: torch.Tensor) -> float:
        with torch.no_grad():
            form[-1].weight.copy_(outputs)
        return moments.squared_error(form.to_dense().weight.detach() - weight)

    least = error(last)
    for seed in range(10):
        step = 0.1 * tensor_of(last.shape, seed=seed) * last.norm() / last.numel() ** 0.5
        ahead, behind = error(last + step), error(last - step)
        assert min(ahead, behind) > least
        assert ahead - least == pytest.approx(behind - least, rel=1e-4)


def test_at_equal_parameters_it_loses_less_of_a_real_kernel_than_tucker2() -> None:
    layer = nn.Conv2d(64, 64, 3)
    layer.weight = nn.Parameter(make_model().features[3].weight.detach())
    ring, tucker2 = TensorRing(), METHODS["tucker2"]()
    ours = ring.fit(layer, WEIGHT_METRIC).build((16, 16))
    theirs = tucker2.fit(layer, WEIGHT_METRIC).build((24, 24))
    cost, other = count_parameters(ours), count_parameters(theirs)
    assert 0.95 * other < cost <= 1.3 * other
    errors = [relative(one.to_dense().weight, layer.weight) ** 2 for one in (ours, theirs)]
    assert errors[0] < 0.8 * errors[1]


def test_the_loss_of_a_real_kernel_is_no_less_than_its_error() -> None:
    layer = nn.Conv2d(32, 32, 3)
    layer.weight = nn.Parameter(make_model().features[3].weight.detach()[:32, :32])
    family = TensorRing().fit(layer, WEIGHT_METRIC)
    for rank in ((8, 8), (16, 8), (8, 24)):
        error = relative(family.build(rank).to_dense().weight, layer.weight) ** 2
        assert 0.999 * error <= family.loss(rank) <= 2.5 * error


def test_costs_by_hand() -> None:
    """The core counts once as parameters, and for each of the slices as products."""
    layer = nn.Conv2d(16, 20, 3, stride=2, padding=1, bias=False)
    form = TensorRing(alignment=4).skeleton(layer, (8, 4))
    assert form[1].slices == 4 and form[1].layer.stride == (2, 2)
    around = 16 * 4 * 4, 4 * 8 * 20
    assert count_parameters(form) == around[0] + 4 * 8 * 9 + around[1]
    counted = count_layer_macs(form, [(1, 16, 10, 10)])  # 5x5 outputs
    assert counted == around[0] * 100 + (4 * 4 * 8 * 9 + around[1]) * 25


def test_there_are_no_more_slices_than_aligned_channels() -> None:
    assert TensorRing().skeleton(nn.Conv2d(16, 64, 3), (8, 8))[1].slices == 2
    assert TensorRing().skeleton(nn.Conv2d(64, 64, 3), (8, 8))[1].slices == 4
    assert TensorRing(slices=6).skeleton(nn.Conv2d(64, 64, 3), (8, 8))[1].slices == 6


def test_compiles_exports_and_round_trips_like_any_module() -> None:
    layer = nn.Conv2d(16, 24, 3, padding=1, stride=(2, 1), dilation=(1, 2))
    form = TensorRing().fit(layer, WEIGHT_METRIC).build((8, 8)).eval()
    inputs = torch.randn(2, 16, 7, 7)
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    exported = torch.export.export(form, (inputs,), dynamic_shapes=shapes).module()
    for given in (inputs, torch.randn(5, 16, 7, 7)):
        torch.testing.assert_close(exported(given), form(given))
    other = TensorRingConvolution(layer, (2, 8, 8)).eval()
    other.load_state_dict(form.state_dict())
    assert torch.equal(other(inputs), form(inputs))


def test_layers_without_channels_for_two_slices_are_left() -> None:
    assert "only 8 channels" in TensorRing().why_not(nn.Conv2d(8, 64, 3))
    assert "only 8 channels" in TensorRing().why_not(nn.Conv2d(64, 8, 3))
    assert "svd serves it" in TensorRing().why_not(nn.Conv2d(64, 64, 1))
    assert TensorRing().why_not(nn.Conv2d(64, 64, 3)) is None


@pytest.mark.parametrize("slices", [0, -1, 2.0, "4", True])
def test_senseless_slices_are_refused(slices) -> None:
    with pytest.raises(ValueError, match="slices is an integer of at least 1"):
        TensorRing(slices=slices)


def test_rings_with_more_slices_than_channels_are_refused() -> None:
    with pytest.raises(RankError, match=r"1\.\.16, 1\.\.24, 1\.\.16"):
        TensorRingConvolution(nn.Conv2d(16, 24, 3), (17, 8, 8))
