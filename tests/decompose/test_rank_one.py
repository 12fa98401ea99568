import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensors import seeds, tensor_of

from rankfold.decompose import cp, rank_one_terms, svd, tucker
from rankfold.decompose.cp.form import multiply_out
from rankfold.errors import RankError

shapes = st.lists(st.integers(2, 6), min_size=2, max_size=4).map(tuple)


@given(st.integers(2, 12), st.integers(2, 12), seeds, st.data())
def test_of_a_matrix_it_is_the_svd(rows, columns, seed, data) -> None:
    rank = data.draw(st.integers(1, min(rows, columns)))
    matrix = tensor_of((rows, columns), seed=seed)
    found = rank_one_terms(matrix, rank, iterations=2000, improvement=1e-13)
    assert found.relative_error(matrix) == pytest.approx(
        svd(matrix, rank).relative_error(matrix), abs=2e-3
    )


@given(shapes, seeds)
def test_smaller_ranks_are_its_leading_terms(shape, seed) -> None:
    tensor = tensor_of(shape, seed=seed)
    found = rank_one_terms(tensor, 2)
    torch.testing.assert_close(found.truncate(1).to_tensor(), rank_one_terms(tensor, 1).to_tensor())


@given(shapes, seeds)
def test_each_term_takes_its_squared_norm_off_the_error(shape, seed) -> None:
    """The best scale of a term is its inner product with what is left."""
    tensor = tensor_of(shape, seed=seed)
    found = rank_one_terms(tensor, 2)
    left = tensor.square().sum().item() - found.sensitivity
    assert found.relative_error(tensor) ** 2 * tensor.square().sum().item() == pytest.approx(left)


@given(shapes, seeds)
def test_one_term_is_a_tucker_decomposition_of_rank_one_or_better_than_its_start(
    shape, seed
) -> None:
    tensor = tensor_of(shape, seed=seed)
    hosvd = tucker(tensor, (1,) * len(shape), sweeps=0).relative_error(tensor)
    found = rank_one_terms(tensor, 1, iterations=500).relative_error(tensor)
    assert found <= hosvd + 0.1  # another local optimum now and then


def test_a_rank_one_tensor_is_one_term() -> None:
    tensor = multiply_out([tensor_of((n, 1), seed=n) for n in (4, 5, 6)])
    assert rank_one_terms(tensor, tolerance=1e-6).ranks == (1,)


def test_greedy_terms_are_worse_than_those_found_together() -> None:
    tensor = multiply_out([tensor_of((n, 4), seed=n) for n in (6, 7, 8)])
    greedy, together = rank_one_terms(tensor, 4), cp(tensor, 4)
    assert together.relative_error(tensor) < 1e-3 < greedy.relative_error(tensor)


def test_what_makes_no_sense_is_refused() -> None:
    tensor = tensor_of((3, 4, 5))
    for rank in (0, 13):
        with pytest.raises(RankError, match=r"1\.\.12"):
            rank_one_terms(tensor, rank)
    for arguments in ({}, {"rank": 2, "tolerance": 0.1}, {"tolerance": 1.0}):
        with pytest.raises(ValueError, match="tolerance"):
            rank_one_terms(tensor, **arguments)
    with pytest.raises(RankError, match="two modes"):
        rank_one_terms(tensor_of((3,)), 1)
    with pytest.raises(RankError, match="two modes"):
        rank_one_terms(torch.empty(3, 0), 1)
    assert rank_one_terms(torch.full((1, 1), -2.0), 1).to_tensor().item() == pytest.approx(-2)
