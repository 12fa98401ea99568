"""Block diagonal plus low rank: the form, the fit, and a network of it."""

import math
from itertools import pairwise

import pytest
import torch
from geometry import relative
from hypothesis import given
from hypothesis import strategies as st
from tensors import seeds, tensor_of, weight_of
from torch import nn

import rankfold
from rankfold.cost import count_parameters
from rankfold.errors import RankError
from rankfold.layers import BlockDiagonalConvolution, BlockDiagonalLinear
from rankfold.layers.block_diagonal import GroupedLinear
from rankfold.methods import METHODS, WEIGHT_METRIC, BlockDiagonal, Moments
from rankfold.methods.block_diagonal import (
    _blocks_times_inputs,
    _diagonal_times_gradients,
    _placed,
    _projection,
)
from rankfold.methods.svd import low_rank_factors

METRICS = {
    "weight": lambda outputs, inputs: WEIGHT_METRIC,
    "response": lambda outputs, inputs: Moments(weight_of(inputs, 2)),
    "fisher": lambda outputs, inputs: Moments(weight_of(inputs, 2), weight_of(outputs, 3)),
}
in_every_metric = pytest.mark.parametrize("metric", METRICS)


def layer_of(weight: torch.Tensor) -> nn.Module:
    outputs, inputs, *kernel = weight.shape
    made = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d}[len(kernel)]
    layer = made(inputs, outputs, *([tuple(kernel)] if kernel else []), dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def sum_of(groups: int, rank: int, shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    outputs, inputs = shape
    blocks = tensor_of((groups, outputs // groups, inputs // groups), seed=seed)
    left, right = (
        tensor_of((outputs, rank), seed=seed + 1),
        tensor_of((rank, inputs), seed=seed + 2),
    )
    return torch.block_diag(*blocks) + left @ right / rank**0.5


def squared_error(form: nn.Module, layer: nn.Module, moments: Moments) -> float:
    weight = layer.weight.detach()
    difference = form.to_dense().weight.detach() - weight
    return moments.squared_error(difference) / moments.squared_error(weight)


@given(
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 5),
    st.lists(st.integers(0, 3), max_size=3),
    seeds,
)
def test_a_grouped_linear_layer_is_a_grouped_convolution(groups, outputs, inputs, leading, seed):
    layer = GroupedLinear(groups * inputs, groups * outputs, groups, dtype=torch.float64)
    peer = nn.Conv1d(
        groups * inputs, groups * outputs, 1, groups=groups, bias=False, dtype=torch.float64
    )
    with torch.no_grad():
        peer.weight.copy_(layer.weight.reshape(peer.weight.shape))
    given_ = tensor_of((*leading, groups * inputs), seed=seed)
    expected = peer(given_.reshape(-1, groups * inputs, 1))
    expected = expected.reshape(*leading, groups * outputs)
    torch.testing.assert_close(layer(given_), expected)


@pytest.mark.parametrize(
    ("form", "shape"),
    [
        (BlockDiagonalLinear(nn.Linear(24, 16), (6, 3)), (5, 24)),
        (BlockDiagonalConvolution(nn.Conv2d(24, 16, 1), (6, 3)), (2, 24, 5, 4)),
        (BlockDiagonalConvolution(nn.Conv2d(24, 16, 3, stride=2), (6, 3)), (2, 24, 9, 8)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_form_is_exported(form, shape) -> None:
    given_ = torch.randn(shape)
    exported = torch.export.export(form, (given_,)).module()
    torch.testing.assert_close(exported(given_), form(given_))
    torch.testing.assert_close(form(given_), form.to_dense()(given_), rtol=1e-4, atol=1e-5)


@in_every_metric
@pytest.mark.parametrize("groups", [2, 4])
def test_what_has_exactly_this_form_is_recovered(groups, metric) -> None:
    """Where blocks are few enough to be told from the low rank."""
    layer = layer_of(sum_of(groups, 3, (32, 48)))
    moments = METRICS[metric](32, 48)
    form = BlockDiagonal(alignment=1).fit(layer, moments).build((48 // groups, 3))
    assert squared_error(form, layer, moments) < 1e-4


@in_every_metric
def test_given_the_low_rank_the_blocks_are_the_best_and_the_other_way_round(metric) -> None:
    """Both conditions of an optimum, each against a closed form."""
    layer = layer_of(tensor_of((12, 16)))
    moments = METRICS[metric](12, 16)
    weight = layer.weight.detach()
    form = BlockDiagonal(alignment=1).fit(layer, moments).build((4, 2))
    reached = squared_error(form, layer, moments)
    blocks, first, last = (one.weight.detach() for one in form)

    rest = layer_of(weight - torch.block_diag(*blocks))
    low_rank = METHODS["svd"]().fit(rest, moments).build((2,)).to_dense().weight.detach()
    best = moments.squared_error(low_rank - rest.weight.detach())
    assert reached == pytest.approx(best / moments.squared_error(weight), rel=1e-6)

    # Least squares of the whitened weight on the entries of the blocks, one column for each.
    rest = weight - last @ first
    roots = [
        torch.eye(n, dtype=torch.float64) if moment is None else torch.linalg.cholesky(moment)
        for n, moment in ((12, moments.gradients), (16, moments.inputs))
    ]
    mask = torch.block_diag(*torch.ones(4, 3, 4)).bool()
    design = torch.kron(roots[0].mT.contiguous(), roots[1].mT.contiguous())[:, mask.flatten()]
    target = (roots[0].mT @ rest @ roots[1]).flatten()
    solved = torch.linalg.lstsq(design, target[:, None]).solution
    least = (design @ solved - target[:, None]).square().sum().item()
    assert least <= reached * moments.squared_error(weight) <= 1.01 * least


@in_every_metric
def test_any_square_weight_is_two_blocks_and_half_of_full_rank(metric) -> None:
    """The two corners beside the blocks are of that rank each, and are had together."""
    layer, moments = layer_of(tensor_of((16, 16))), METRICS[metric](16, 16)
    form = BlockDiagonal().fit(layer, moments).build((8, 8))
    assert squared_error(form, layer, moments) < 1e-4


@in_every_metric
@pytest.mark.parametrize("kernel", [(), (1, 1), (3,)], ids=str)
def test_no_worse_than_the_low_rank_alone_or_the_blocks_alone(kernel, metric) -> None:
    layer = layer_of(tensor_of((16, 24, *kernel)))
    moments = METRICS[metric](16, layer.weight[0].numel())
    family, low_rank = BlockDiagonal().fit(layer, moments), METHODS["svd"]().fit(layer, moments)
    for width in (6, 12):
        form = BlockDiagonal(alignment=1).fit(layer, moments).build((width, 4))
        assert squared_error(form, layer, moments) < low_rank.loss((4,))
    assert family.loss((12, 8)) < low_rank.loss((8,))


def test_blocks_hold_more_than_low_rank_does_for_the_same_cost() -> None:
    layer = layer_of(sum_of(4, 2, (64, 64)) + 0.1 * tensor_of((64, 64), seed=9))
    form = BlockDiagonal().fit(layer, WEIGHT_METRIC).build((16, 8))
    affordable = (count_parameters(form) - 64) // 128
    error = squared_error(form, layer, WEIGHT_METRIC)
    assert 10 * error < METHODS["svd"]().fit(layer, WEIGHT_METRIC).loss((affordable,))


@pytest.mark.parametrize(
    ("layer", "widths"),
    [
        (nn.Conv2d(96, 576, 1), [8, 24, 48]),
        (nn.Conv2d(288, 48, 1), [48, 144]),
        (nn.Linear(24, 40), [12]),
        (nn.Linear(15, 25), [3]),
    ],
    ids=str,
)
def test_groups_are_aligned_and_divide_each_other(layer, widths) -> None:
    ranks = BlockDiagonal().fit(layer, WEIGHT_METRIC).ranks()
    assert sorted({width for width, _ in ranks}) == widths
    groups = [layer.weight.shape[1] // width for width in reversed(widths)]
    assert all(more % fewer == 0 for fewer, more in pairwise(groups))


@pytest.mark.parametrize("layer", [nn.Linear(24, 16), nn.Conv2d(24, 16, 1)], ids=str)
def test_groups_that_do_not_divide_both_sides_are_refused(layer) -> None:
    family = BlockDiagonal().fit(layer, WEIGHT_METRIC)
    for width in (5, 8):  # 24 inputs are three groups of 8, of which 16 outputs know nothing
        with pytest.raises(RankError, match=f"groups of {width} inputs do not divide"):
            family.build((width, 4))


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.Linear(24, 25), "no groups divide both 24 inputs and 25 outputs"),
        (nn.Conv2d(1, 16, 3), "no groups divide both 1 inputs and 16 outputs"),
        (nn.Conv2d(32, 32, 3, groups=2), "groups=2"),
        (nn.LSTM(8, 8), "LSTM"),
    ],
    ids=str,
)
def test_why_a_layer_is_left(layer, words) -> None:
    assert words in BlockDiagonal().why_not(layer)


def test_a_network_is_planned_saved_and_loaded(tmp_path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 32, 3),
            nn.ReLU(),
            nn.Conv2d(32, 64, 1, stride=2),
            nn.Flatten(),
            nn.Linear(64 * 9, 32),
        ).eval()

    data = list(tensor_of((12, 3, 8, 8), torch.float32).split(3))
    analysis = rankfold.analyze(make(), data, methods=["block-diagonal"])
    plan = analysis.plan(macs=0.8)
    assert {entry.method for entry in plan.factorized} == {"block-diagonal"}
    small = rankfold.factorize(make(), plan)
    rankfold.save(small, tmp_path / "small")
    loaded = rankfold.load(tmp_path / "small", like=make)
    with torch.no_grad():
        assert torch.equal(loaded(data[0]), small(data[0]))
        assert relative(small(data[0]), make()(data[0])) < 1


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_a_metric_of_few_samples_is_taken(rank) -> None:
    layer = nn.Conv2d(16, 16, 3)
    samples = tensor_of((rank, 144))
    moments = Moments(samples.mT @ samples)
    family = BlockDiagonal().fit(layer, moments)
    for candidate in family.ranks()[::3]:
        form = family.build(candidate)
        assert all(torch.isfinite(parameter).all() for parameter in form.parameters())
        assert 0 <= family.loss(candidate) <= 1 + 1e-9


@in_every_metric
@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (8, 12, 3)], ids=str)
def test_products_that_skip_zeros_are_those_of_the_whole_weight(shape, metric) -> None:
    """With the moments of channels; with those of whole patches too."""
    outputs, inputs, *kernel = shape
    blocks = tensor_of((4, outputs // 4, inputs // 4, *kernel))
    weight, patches = tensor_of(shape, seed=1), math.prod(shape[1:])
    for moments in (METRICS[metric](outputs, inputs), METRICS[metric](outputs, patches)):
        response = moments.times_inputs(_placed(blocks))
        torch.testing.assert_close(_blocks_times_inputs(blocks, moments), response)
        expected = moments.times_gradients(weight).reshape(shape)
        found = _diagonal_times_gradients(weight.flatten(1), blocks, moments)
        assert found.shape == blocks.shape
        for k, block in enumerate(found):
            rows, columns = (
                slice(k * outputs // 4, (k + 1) * outputs // 4),
                slice(k * inputs // 4, (k + 1) * inputs // 4),
            )
            torch.testing.assert_close(block, expected[rows, columns])


@in_every_metric
@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (8, 12, 3)], ids=str)
def test_the_projection_is_the_best_of_its_rank(shape, metric) -> None:
    moments = METRICS[metric](*shape[:2])
    weight = tensor_of(shape)
    response = moments.times_inputs(weight)
    for rank in (1, 3, 8):
        left, right, seen = _projection(weight.flatten(1), response, rank, moments)
        torch.testing.assert_close(seen, moments.times_inputs(right.reshape(rank, *shape[1:])))
        values = low_rank_factors(weight, moments)[2]
        difference = weight - (left @ right).reshape(shape)
        lost = values[rank:].square().sum().item()
        assert moments.squared_error(difference) == pytest.approx(lost, rel=1e-6, abs=1e-12)
