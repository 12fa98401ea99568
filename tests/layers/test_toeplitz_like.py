import pytest
import torch
from geometry import FEATURES, relative
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
from tensors import tensor_of

from rankfold.errors import RankError
from rankfold.layers import ToeplitzLikeLinear, square_size


def unit_circulant(size: int, corner: float) -> torch.Tensor:
    """Z_f: ones below the diagonal, f in the upper right corner."""
    matrix = torch.diag(torch.ones(size - 1, dtype=torch.float64), -1)
    matrix[0, -1] = corner
    return matrix


def krylov(column: torch.Tensor, corner: float) -> torch.Tensor:
    """Z_f(v): the columns are Z_f^k v."""
    shift, columns = unit_circulant(len(column), corner), [column]
    for _ in range(len(column) - 1):
        columns.append(shift @ columns[-1])
    return torch.stack(columns, 1)


@pytest.mark.parametrize("sides", [(1, 1), (7, 5), (5, 7), (12, 12), (13, 13), (1, 4), (17, 3)])
@pytest.mark.parametrize("rank", [1, 2])
def test_the_weight_is_that_of_the_definition(sides, rank) -> None:
    layer = ToeplitzLikeLinear(*sides, rank, dtype=torch.float64)
    terms = zip(*layer.factors, strict=True)
    whole = sum(krylov(g.detach(), 1) @ krylov(h.detach(), -1) for g, h in terms)
    corner = whole[: sides[1], : sides[0]]
    torch.testing.assert_close(layer.to_weight().detach(), corner, rtol=0, atol=1e-13)


@pytest.mark.parametrize("rank", [1, 3])
def test_the_displacement_has_the_rank(rank) -> None:
    weight = ToeplitzLikeLinear(16, 16, rank, dtype=torch.float64).to_weight().detach()
    displacement = unit_circulant(16, 1) @ weight - weight @ unit_circulant(16, -1)
    assert torch.linalg.matrix_rank(displacement, rtol=1e-10) == rank


def test_the_size_is_even_and_fast() -> None:
    sizes = [square_size(*sides) for sides in ((1, 1), (10, 13), (1021, 3), (1024, 1024))]
    assert sizes == [2, 16, 1024, 1024]


@settings(max_examples=60, deadline=None)
@given(
    FEATURES,
    FEATURES,
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from(list(ROUNDING)),
    st.sampled_from([(), (1,), (0,), (2, 3), (5, 0)]),
)
def test_the_product_is_that_with_the_weight(inputs, outputs, rank, bias, dtype, leading) -> None:
    rank = min(rank, square_size(inputs, outputs))
    check_product(ToeplitzLikeLinear(inputs, outputs, rank, bias), dtype, leading)


@pytest.mark.parametrize("sides", [(8, 5), (7, 11), (1, 1)])
def test_gradients(sides) -> None:
    check_gradients(ToeplitzLikeLinear(*sides, 2))


def test_it_is_cast_compiled_and_exported() -> None:
    check_programs(ToeplitzLikeLinear(11, 7, 3))


@pytest.mark.parametrize("rank", [1, 4])
def test_activations_keep_their_scale(rank) -> None:
    check_initial_scale(ToeplitzLikeLinear, rank)
    check_initial_scale(ToeplitzLikeLinear, rank, relu=True, layers=1)


@pytest.mark.parametrize("sides", [(32, 32), (24, 40), (40, 24), (11, 11)])
@pytest.mark.parametrize("rank", [1, 3])
def test_the_initial_variance(sides, rank) -> None:
    check_initial_variance(ToeplitzLikeLinear, sides, rank)


def test_one_term_is_orthogonal_at_first() -> None:
    weight = ToeplitzLikeLinear(20, 20, 1).to_weight()
    torch.testing.assert_close(weight @ weight.mT, torch.eye(20), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [0, -1, 17])
def test_impossible_ranks_are_refused(rank) -> None:
    with pytest.raises(RankError, match=r"outside 1\.\.16"):
        ToeplitzLikeLinear(15, 16, rank)


def test_a_large_layer_is_as_exact_as_a_dense_one() -> None:
    layer = ToeplitzLikeLinear(1000, 777, 4).eval()
    rows = tensor_of((8, 1000), torch.float32)
    exact = layer.double()(rows.double())
    assert relative(layer.float()(rows), exact) < 1e-6
