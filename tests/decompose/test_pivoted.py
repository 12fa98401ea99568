import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankfold.decompose import interpolative, pivoted_qr, svd
from rankfold.errors import RankError, TensorError

TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-13}
sides = st.integers(1, 30)
dtypes = st.sampled_from(list(TOLERANCE))
seeds = st.integers(0, 1000)


def matrix(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, dtype=torch.float64, generator=generator).to(dtype)


@given(sides, sides, dtypes, seeds)
def test_qr_gives_the_matrix_back_with_falling_pivots(rows, columns, dtype, seed) -> None:
    given_matrix = matrix(rows, columns, dtype, seed)
    found = pivoted_qr(given_matrix)
    assert found.relative_error(given_matrix) < TOLERANCE[dtype]
    identity = torch.eye(found.ranks[0], dtype=dtype)
    torch.testing.assert_close(found.q.mT @ found.q, identity, rtol=0, atol=1e-5)
    assert torch.equal(found.r, found.r.triu())
    pivots = found.r.diagonal().abs()
    assert (pivots[1:] <= pivots[:-1] * (1 + 1e-5)).all()


@given(sides, sides, dtypes, seeds, st.data())
def test_chosen_columns_stay_as_they_are(rows, columns, dtype, seed, data) -> None:
    given_matrix = matrix(rows, columns, dtype, seed)
    rank = data.draw(st.integers(1, min(rows, columns)))
    found = interpolative(given_matrix, rank)
    assert torch.equal(found.skeleton, given_matrix[:, found.columns])
    torch.testing.assert_close(
        found.coefficients[:, found.columns], torch.eye(rank, dtype=dtype), rtol=0, atol=1e-6
    )
    # Never better than the SVD; at worst (Gu and Eisenstat 1996) far from it, in practice near.
    best = svd(given_matrix, rank).relative_error(given_matrix)
    assert best - 1e-6 <= found.relative_error(given_matrix) <= 10 * best + 1e-4


@given(sides, sides, seeds, st.integers(1, 5))
def test_as_many_columns_as_the_rank_are_enough(rows, columns, seed, rank) -> None:
    rank = min(rank, rows, columns)
    double = torch.float64
    low = matrix(rows, rank, double, seed) @ matrix(rank, columns, double, seed + 1)
    assert interpolative(low, rank).relative_error(low) < 1e-8
    assert interpolative(low, tolerance=1e-6).ranks[0] <= rank
    assert interpolative(low).relative_error(low) < 1e-6  # singular beyond the rank


@given(sides, sides, dtypes, seeds, st.floats(0.01, 0.9))
def test_tolerance_is_kept(rows, columns, dtype, seed, tolerance) -> None:
    given_matrix = matrix(rows, columns, dtype, seed)
    found = interpolative(given_matrix, tolerance=tolerance)
    assert found.relative_error(given_matrix) <= tolerance + TOLERANCE[dtype]


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(RankError, match=r"1\.\.3"):
        interpolative(torch.randn(3, 5), 4)
    with pytest.raises(RankError, match="non-empty matrix"):
        pivoted_qr(torch.randn(3))
    with pytest.raises(ValueError, match="at most one"):
        interpolative(torch.randn(3, 5), 2, tolerance=0.1)
    with pytest.raises(ValueError, match="tolerance"):
        interpolative(torch.randn(3, 5), tolerance=1.0)
    with pytest.raises(TensorError, match="NaN"):
        interpolative(torch.full((3, 3), torch.nan))
    assert interpolative(torch.zeros(3, 4)).relative_error(torch.zeros(3, 4)) == 0


def test_without_any_error_all_of_the_rank_is_kept() -> None:
    matrix = torch.randn(6, 4, dtype=torch.float64)
    assert interpolative(matrix, tolerance=0.0).ranks == (4,)


@pytest.mark.parametrize("size", [(9, 4), (4, 9)])
def test_no_more_columns_than_the_shorter_side(size) -> None:
    found = pivoted_qr(torch.randn(size))
    assert found.q.shape == (size[0], 4) and found.r.shape == (4, size[1])
