import pytest
import torch
from geometry import FEATURES
from hypothesis import given, settings
from hypothesis import strategies as st
from structured import (
    ROUNDING,
    check_gradients,
    check_initial_scale,
    check_initial_variance,
    check_product,
    check_programs,
)

from rankfold.errors import RankError
from rankfold.layers import MonarchLinear, block_lengths


def test_the_weight_is_that_of_the_definition() -> None:
    """P L Pᵀ R of 16 features, with P the transposition of 4x4."""
    layer = MonarchLinear(16, 16, dtype=torch.float64)
    right, left = (torch.block_diag(*factor.detach()) for factor in layer.factors)
    shuffle = torch.eye(16, dtype=torch.float64).reshape(4, 4, 16).transpose(0, 1).reshape(16, 16)
    torch.testing.assert_close(
        layer.to_weight().detach(), shuffle @ left @ shuffle.mT @ right, rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("rank", [1, 2])
def test_between_blocks_it_has_the_rank(rank) -> None:
    weight = MonarchLinear(20, 15, rank, 5, dtype=torch.float64).to_weight().detach()
    for first in range(5):
        for second in range(5):
            piece = weight[first::5, 4 * second : 4 * second + 4]
            assert torch.linalg.matrix_rank(piece) == rank


@settings(max_examples=60, deadline=None)
@given(
    FEATURES,
    FEATURES,
    st.data(),
    st.booleans(),
    st.sampled_from(list(ROUNDING)),
    st.sampled_from([(), (1,), (0,), (2, 3), (5, 0)]),
)
def test_the_product_is_that_with_the_weight(inputs, outputs, data, bias, dtype, leading) -> None:
    blocks = data.draw(st.integers(1, min(inputs, outputs)))
    rank = data.draw(st.integers(1, min(block_lengths(inputs, outputs, blocks))))
    check_product(MonarchLinear(inputs, outputs, rank, blocks, bias), dtype, leading)


@pytest.mark.parametrize("sides", [(8, 5), (7, 11), (1, 1)])
def test_gradients(sides) -> None:
    check_gradients(MonarchLinear(*sides))


def test_it_is_cast_compiled_and_exported() -> None:
    check_programs(MonarchLinear(11, 7, 2))


@pytest.mark.parametrize("rank", [1, 4])
def test_activations_keep_their_scale(rank) -> None:
    check_initial_scale(MonarchLinear, rank)
    check_initial_scale(MonarchLinear, rank, relu=True)


@pytest.mark.parametrize("sides", [(32, 32), (24, 40), (40, 24), (11, 11)])
@pytest.mark.parametrize("rank", [1, 3])
def test_the_initial_variance(sides, rank) -> None:
    check_initial_variance(MonarchLinear, sides, rank)


@pytest.mark.parametrize(("rank", "blocks"), [(0, 4), (5, 4), (1, 0), (1, 13), (4, 5)])
def test_impossible_ranks_and_blocks_are_refused(rank, blocks) -> None:
    with pytest.raises(RankError, match=r"outside 1\.\."):
        MonarchLinear(16, 12, rank, blocks)


def test_blocks_are_as_many_as_features_in_one() -> None:
    assert MonarchLinear(1024, 1024).blocks == 32
    assert sum(one.numel() for one in MonarchLinear(1024, 1024).factors) == 2 * 1024 * 32
