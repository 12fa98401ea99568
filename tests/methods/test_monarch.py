"""The Monarch matrix nearest to a weight, piece by piece, and in a metric."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from structured import check_saved
from tensors import seeds, tensor_of, weight_of
from torch import nn

from rankfold.layers import MonarchLinear, block_lengths
from rankfold.methods import WEIGHT_METRIC, Moments, Monarch


def linear(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
    layer.weight.data.copy_(weight)
    return layer


def error_of(form: nn.Module, layer: nn.Linear, moments: Moments = WEIGHT_METRIC) -> float:
    weight = layer.weight.detach()
    difference = form.to_dense().weight.detach() - weight
    return moments.squared_error(difference) / moments.squared_error(weight)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 20), st.integers(1, 20), st.data(), seeds)
def test_the_error_is_what_the_svd_of_every_piece_leaves(inputs, outputs, data, seed) -> None:
    """Dao et al. 2022, theorem 1."""
    blocks = data.draw(st.integers(1, min(inputs, outputs)))
    length = block_lengths(inputs, outputs, blocks)
    rank = data.draw(st.integers(1, min(length)))
    layer = linear(tensor_of((outputs, inputs), seed=seed))
    weight, left = layer.weight.detach(), 0.0
    for first in range(blocks):
        for second in range(blocks):
            columns = slice(length[0] * second, length[0] * (second + 1))
            piece = weight[first::blocks, columns]
            left += torch.linalg.svdvals(piece)[rank:].square().sum().item()
    family = Monarch(blocks=blocks).fit(layer, WEIGHT_METRIC)
    expected = left / weight.square().sum().item()
    assert error_of(family.build((rank,)), layer) == pytest.approx(expected, abs=1e-12)
    if rank == 1 and (1,) in family.ranks():
        assert family.loss((rank,)) == pytest.approx(expected, rel=1e-3, abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 20), st.integers(2, 20), st.booleans(), seeds)
def test_what_has_the_form_is_found(inputs, outputs, in_a_metric, seed) -> None:
    torch.manual_seed(seed)
    exact = MonarchLinear(inputs, outputs, dtype=torch.float64).to_dense()
    moments = WEIGHT_METRIC
    if in_a_metric:
        moments = Moments(weight_of(inputs, seed=seed), weight_of(outputs, seed=seed + 1))
    assert error_of(Monarch().fit(exact, moments).build((1,)), exact) < 1e-15


@pytest.mark.parametrize("sides", [(16, 16), (24, 10), (11, 13)])
def test_in_a_metric_that_is_of_blocks_pieces_are_best(sides) -> None:
    """No step from what is found lowers the error, and the start is found already."""
    outputs, inputs = sides
    layer = linear(tensor_of(sides, seed=1))
    lengths = block_lengths(inputs, outputs, 3)
    blocks = [weight_of(lengths[0], seed=seed) for seed in range(3)]
    moments = Moments(torch.block_diag(*blocks)[:inputs, :inputs].contiguous())
    weight, left = layer.weight.detach(), 0.0
    for first in range(3):
        for second in range(3):
            columns = slice(lengths[0] * second, min(inputs, lengths[0] * (second + 1)))
            root = torch.linalg.cholesky(moments.inputs[columns, columns])
            values = torch.linalg.svdvals(weight[first::3, columns] @ root)
            left += values[1:].square().sum().item()
    form = Monarch(blocks=3).fit(layer, moments).build((1,))
    expected = left / moments.squared_error(weight)
    assert error_of(form, layer, moments) == pytest.approx(expected, rel=1e-6)


def test_in_a_metric_the_error_is_far_less_than_that_of_the_nearest_weight() -> None:
    layer = linear(tensor_of((24, 30), seed=1))
    moments = Moments(weight_of(30, seed=2), weight_of(24, seed=3))
    made, nearest = (Monarch().fit(layer, one).build((2,)) for one in (moments, WEIGHT_METRIC))
    assert error_of(made, layer, moments) < 0.5 * error_of(nearest, layer, moments)


@pytest.mark.parametrize("blocks", [0, 2.0, "4", True])
def test_senseless_blocks_are_refused(blocks) -> None:
    with pytest.raises(ValueError, match="integer of at least 1"):
        Monarch(blocks=blocks)


def test_more_blocks_than_features_are_as_many_as_there_are() -> None:
    layer = nn.Linear(3, 5)
    assert Monarch(blocks=8).skeleton(layer, (1,)).blocks == 3


def test_a_network_with_it_is_saved_and_loaded(tmp_path) -> None:
    check_saved("monarch", (2,), tmp_path)
