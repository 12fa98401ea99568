"""Toeplitz-like weights near a weight: from its displacement, then by turns."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from structured import check_saved
from tensors import seeds, tensor_of, weight_of
from torch import nn

from rankfold.decompose import svd
from rankfold.layers import ToeplitzLikeLinear
from rankfold.methods import METHODS, WEIGHT_METRIC, Moments, ToeplitzLike

METHOD = ToeplitzLike()


def linear(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
    layer.weight.data.copy_(weight)
    return layer


def error_of(form: nn.Module, layer: nn.Linear, moments: Moments = WEIGHT_METRIC) -> float:
    weight = layer.weight.detach()
    difference = form.to_dense().weight.detach() - weight
    return moments.squared_error(difference) / moments.squared_error(weight)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([2, 8, 12, 20]), st.integers(1, 3), st.booleans(), seeds)
def test_a_square_of_this_rank_is_found(size, rank, in_a_metric, seed) -> None:
    torch.manual_seed(seed)
    exact = ToeplitzLikeLinear(size, size, min(rank, size), dtype=torch.float64).to_dense()
    moments = WEIGHT_METRIC
    if in_a_metric:
        moments = Moments(weight_of(size, seed=seed), weight_of(size, seed=seed + 1))
    form = METHOD.fit(exact, moments).build((min(rank, size),))
    assert error_of(form, exact) < 1e-18


def test_a_toeplitz_matrix_has_the_displacement_rank_two() -> None:
    numbers = tensor_of((31,), seed=0)
    indices = torch.arange(16)[:, None] - torch.arange(16) + 15
    layer = linear(numbers[indices])
    family = METHOD.fit(layer, WEIGHT_METRIC)
    assert error_of(family.build((2,)), layer) < 1e-20
    assert error_of(family.build((1,)), layer) > 1e-2


@pytest.mark.parametrize("sides", [(16, 16), (24, 10), (11, 13)])
@pytest.mark.parametrize("rank", [1, 3])
def test_turns_lower_the_error_of_the_truncated_displacement(sides, rank) -> None:
    layer = linear(tensor_of(sides, seed=1))
    size = ToeplitzLikeLinear(sides[1], sides[0], rank).size
    square = torch.zeros(size, size, dtype=torch.float64)
    square[: sides[0], : sides[1]] = layer.weight.detach()
    shifted = torch.cat([square[:, 1:], -square[:, :1]], 1)
    found = svd(square.roll(1, 0) - shifted, rank)
    truncated = ToeplitzLikeLinear(sides[1], sides[0], rank, dtype=torch.float64)
    left, right = found.balanced()
    with torch.no_grad():
        truncated.factors[0].copy_(left.mT)
        truncated.factors[1].copy_(right.flip(1) / 2)
    start = error_of(truncated, layer)
    assert error_of(METHOD.fit(layer, WEIGHT_METRIC).build((rank,)), layer) < 0.99 * start


@pytest.mark.parametrize("rank", [1, 3])
def test_no_step_of_a_term_makes_it_better(rank) -> None:
    """In a metric: what is found is a stationary point, up to where turns end."""
    layer = linear(tensor_of((12, 12), seed=2))
    moments = Moments(weight_of(12, seed=3), weight_of(12, seed=4))
    form = METHOD.fit(layer, moments).build((rank,))
    least = error_of(form, layer, moments)
    for seed in range(10):
        for factor in form.factors:
            step = tensor_of(factor.shape, seed=seed)
            step *= 0.1 * factor.detach().norm() / step.norm()
            with torch.no_grad():
                factor.add_(step)
                assert error_of(form, layer, moments) > least
                factor.sub_(step)


def test_a_network_with_it_is_saved_and_loaded(tmp_path) -> None:
    check_saved("toeplitz-like", (2,), tmp_path)


def test_convolutions_are_left_to_others() -> None:
    assert "no factorization for Conv2d" in METHODS["toeplitz-like"]().why_not(nn.Conv2d(4, 4, 1))
