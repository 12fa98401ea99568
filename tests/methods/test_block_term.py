import pytest
import torch
from geometry import relative
from tensors import tensor_of, weight_of
from torch import nn

from rankfold.cost import count_layer_macs, count_parameters
from rankfold.decompose import block_term
from rankfold.demo import make_model
from rankfold.layers import BlockTermConvolution
from rankfold.methods import METHODS, WEIGHT_METRIC, Moments

BLOCKS = METHODS["block-term"]
# Outputs and inputs that blocks of four divide, and that they do not.
LAYERS = [nn.Conv2d(16, 12, 3), nn.Conv1d(14, 18, 5)]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_blocks_between_channels_of_their_own_are_recovered(layer) -> None:
    layer = layer.double()
    outputs, inputs, *kernel = layer.weight.shape
    blocks = torch.zeros(layer.weight.shape, dtype=torch.float64)
    blocks[:4, :4] = 3 * tensor_of((4, 4, *kernel), seed=1)
    blocks[4:8, 4:8] = tensor_of((4, 4, *kernel), seed=2)
    turns = [torch.linalg.qr(tensor_of((n, n), seed=n)).Q for n in (outputs, inputs)]
    with torch.no_grad():
        layer.weight.copy_(torch.einsum("ao,bi,oi...->ab...", *turns, blocks))
    family = BLOCKS(alignment=4).fit(layer, WEIGHT_METRIC)
    assert relative(family.build((2,)).to_dense().weight, layer.weight) < 1e-6
    assert relative(family.build((1,)).to_dense().weight, layer.weight) > 1e-2


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_the_outputs_are_best_in_the_metric_of_patches(layer) -> None:
    """The outputs: a step to either side costs the same, for the error is quadratic in them."""
    layer = layer.double()
    weight = layer.weight.detach()
    moments = Moments(weight_of(weight[0].numel(), 1), weight_of(len(weight), 2))
    form = BLOCKS(alignment=4).fit(layer, moments).build((3,))
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


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_all_pairs_of_groups_are_any_kernel_and_one_is_tucker2(layer) -> None:
    layer = layer.double()
    family = BLOCKS(alignment=4).fit(layer, WEIGHT_METRIC)
    groups = -(-layer.in_channels // 4) * -(-layer.out_channels // 4)
    assert max(family.ranks()) == (groups,)
    assert relative(family.build((groups,)).to_dense().weight, layer.weight) < 1e-12
    tucker2 = METHODS["tucker2"](alignment=4).fit(layer, WEIGHT_METRIC).build((4, 4))
    bound = relative(tucker2.to_dense().weight, layer.weight)
    found = relative(family.build((1,)).to_dense().weight, layer.weight)
    assert found == pytest.approx(bound, rel=0.01)


def test_on_a_real_kernel_it_comes_near_the_greedy_decomposition() -> None:
    """Which adds block after block, refines all each time, and takes many times as long."""
    layer = make_model().features[3].double()
    greedy = block_term(layer.weight.detach().flatten(2), (8, 8), 4, (0, 1), iterations=10)
    form = BLOCKS().fit(layer, WEIGHT_METRIC).build((4,))
    error = relative(form.to_dense().weight, layer.weight)
    assert error < 1.05 * greedy.relative_error(layer.weight.detach().flatten(2))


def test_the_loss_of_a_real_kernel_is_no_less_than_its_error() -> None:
    layer = nn.Conv2d(32, 32, 3)
    layer.weight = nn.Parameter(make_model().features[3].weight.detach()[:32, :32])
    family = BLOCKS().fit(layer, WEIGHT_METRIC)
    for rank in (1, 3, 6):
        error = relative(family.build((rank,)).to_dense().weight, layer.weight) ** 2
        assert 0.999 * error <= family.loss((rank,)) <= 2.5 * error


def test_costs_by_hand() -> None:
    layer = nn.Conv2d(16, 20, 3, stride=2, padding=1, bias=False)
    form = BLOCKS(alignment=4).skeleton(layer, (3,))
    assert form[1].groups == 3 and form[1].stride == (2, 2)
    assert count_parameters(form) == 16 * 12 + 3 * 4 * 4 * 9 + 12 * 20
    counted = count_layer_macs(form, [(1, 16, 10, 10)])  # 5x5 outputs
    assert counted == 16 * 12 * 100 + (3 * 4 * 4 * 9 + 12 * 20) * 25


def test_compiles_exports_and_round_trips_like_any_module() -> None:
    layer = nn.Conv2d(16, 24, 3, padding=1, stride=(2, 1), dilation=(1, 2))
    form = BLOCKS().fit(layer, WEIGHT_METRIC).build((2,)).eval()
    inputs = torch.randn(2, 16, 7, 7)
    torch.testing.assert_close(torch.export.export(form, (inputs,)).module()(inputs), form(inputs))
    other = BlockTermConvolution(layer, 2, 8).eval()
    other.load_state_dict(form.state_dict())
    assert torch.equal(other(inputs), form(inputs))


def test_layers_without_channels_for_two_blocks_are_left() -> None:
    assert "only 8 channels" in BLOCKS().why_not(nn.Conv2d(8, 64, 3))
    assert "only 8 channels" in BLOCKS().why_not(nn.Conv2d(64, 8, 3))
    assert "svd serves it" in BLOCKS().why_not(nn.Conv2d(64, 64, 1))
    assert BLOCKS().why_not(nn.Conv2d(64, 64, 3)) is None
