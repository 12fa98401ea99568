import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensors import seeds, tensor_of, weight_of

from rankfold.decompose import cholesky, lu, plu
from rankfold.decompose.triangular import solve_normal
from rankfold.errors import RankError, TensorError

TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-12}
sides = st.integers(1, 20)
dtypes = st.sampled_from(list(TOLERANCE))


@given(sides, seeds)
def test_cholesky_of_a_regular_matrix(length, seed) -> None:
    matrix = weight_of(length, seed)
    found = cholesky(matrix)
    assert found.raised == 0 and torch.equal(found.lower, found.lower.tril())
    assert found.relative_error(matrix) < 1e-13
    assert found.n_parameters == length * (length + 1) // 2 and found.ranks == (length,)
    right = tensor_of((length, 3), seed=seed)
    torch.testing.assert_close(matrix @ found.solve(right), right, rtol=1e-6, atol=1e-6)


@given(st.integers(2, 20), seeds)
def test_cholesky_of_a_singular_matrix_says_what_it_raised(length, seed) -> None:
    matrix = weight_of(length, seed, rank=length // 2)
    found = cholesky(matrix - 1e-13 * matrix.diagonal().max() * torch.eye(length))
    assert found.raised >= length - length // 2
    assert torch.equal(found.lower, found.lower.tril()) and (found.lower.diagonal() > 0).all()
    assert found.relative_error(matrix) < 1e-10
    zero = cholesky(torch.zeros(3, 3))
    assert zero.raised == 3 and torch.equal(zero.lower, torch.eye(3, dtype=torch.float64))


def test_cholesky_of_a_batch() -> None:
    batch = torch.stack([weight_of(5, 0), weight_of(5, 1, rank=2)])
    found = cholesky(batch)
    assert found.raised == 3 and found.batch_dims == 1 and found.n_parameters == 30
    assert found.relative_error(batch) < 1e-10


@given(sides, sides, seeds, dtypes)
def test_plu_gives_the_matrix_back(rows, columns, seed, dtype) -> None:
    matrix = tensor_of((rows, columns), dtype, seed)
    for found in (plu(matrix), plu(matrix, complete=True)):
        assert found.ranks == (min(rows, columns),)
        assert found.relative_error(matrix) < TOLERANCE[dtype]
        assert torch.equal(found.upper, found.upper.triu())
        assert torch.equal(found.lower, found.lower.tril())
        assert (found.lower.diagonal() == 1).all()
        # Pivoting keeps the multipliers at one or below.
        assert found.lower.abs().max() <= 1 + 1e-6
        torch.testing.assert_close(
            matrix[found.rows][:, found.columns], found.lower @ found.upper, rtol=1e-4, atol=1e-4
        )
        below = (found.lower.tril(-1) != 0).sum() + (found.upper != 0).sum()
        assert below <= found.n_parameters
    assert plu(matrix).n_parameters == rows * columns
    assert torch.equal(plu(matrix).columns, torch.arange(columns))


@given(st.integers(2, 20), st.integers(2, 20), seeds, dtypes, st.data())
def test_complete_pivoting_reveals_the_rank(rows, columns, seed, dtype, data) -> None:
    rank = data.draw(st.integers(1, min(rows, columns)))
    low = tensor_of((rows, rank), seed=seed) @ tensor_of((rank, columns), seed=seed + 1)
    found = plu(low.to(dtype), complete=True)
    assert found.ranks[0] <= rank + (dtype == torch.float32)
    assert found.relative_error(low.to(dtype)) < 1e-4
    assert plu(torch.zeros(rows, columns), complete=True).ranks == (1,)


@given(sides, sides, seeds, dtypes)
def test_lu_of_a_dominant_diagonal_exchanges_nothing(rows, columns, seed, dtype) -> None:
    matrix = tensor_of((rows, columns), dtype, seed)
    matrix.diagonal().add_(100)
    found = lu(matrix)
    assert torch.equal(found.rows, torch.arange(rows))
    torch.testing.assert_close(found.lower @ found.upper, matrix, rtol=1e-4, atol=1e-4)


def test_lu_says_when_a_pivot_vanishes() -> None:
    with pytest.raises(ValueError, match=r"pivot 0 of the matrix 2x2 vanishes: use plu"):
        lu(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    with pytest.raises(ValueError, match="pivot 1"):
        lu(torch.tensor([[1.0, 1, 0], [1, 1, 1], [0, 1, 1]]))
    assert lu(torch.zeros(2, 3)).relative_error(torch.zeros(2, 3)) == 0
    for function in (lu, plu):
        with pytest.raises(RankError, match="2x3x4"):
            function(torch.randn(2, 3, 4))
        with pytest.raises(TensorError, match="NaN"):
            function(torch.full((2, 2), torch.nan))


def test_normal_equations_bear_dependent_columns() -> None:
    columns = tensor_of((9, 3))
    columns = torch.cat([columns, columns[:, :1]], dim=1)
    right = tensor_of((2, 9), seed=1)
    solved = solve_normal(columns.mT @ columns, right @ columns)
    expected = (torch.linalg.pinv(columns) @ right.mT).mT
    torch.testing.assert_close(solved @ columns.mT, expected @ columns.mT, rtol=1e-4, atol=1e-4)


def test_denormal_numbers_are_split_as_others_are() -> None:
    drawn = torch.randn(12, 12, generator=torch.Generator().manual_seed(5)).double()
    matrix = (drawn * 1e-40).float()
    found = plu(matrix)
    assert found.lower.isfinite().all() and found.upper.isfinite().all()
    # Some units in the last place, of which a denormal number has few.
    assert (found.to_tensor().double() - matrix.double()).abs().max() <= 12 * 2.0**-149
