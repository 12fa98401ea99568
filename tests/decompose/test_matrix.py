import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankfold.decompose import full_rank, svd
from rankfold.errors import RankError

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}
sides = st.integers(1, 40)
dtypes = st.sampled_from(list(TOLERANCE))
seeds = st.integers(0, 1000)


def matrix(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, dtype=torch.float64, generator=generator).to(dtype)


@given(sides, sides, dtypes, seeds)
def test_full_rank_gives_the_matrix_back(rows, columns, dtype, seed) -> None:
    given_matrix = matrix(rows, columns, dtype, seed)
    found = svd(given_matrix)
    assert found.ranks == (min(rows, columns),)
    assert found.u.dtype == found.singular_values.dtype == found.vh.dtype == dtype
    assert found.relative_error(given_matrix) < TOLERANCE[dtype]


@given(sides, sides, dtypes, seeds, st.data())
def test_truncation_is_optimal(rows, columns, dtype, seed, data) -> None:
    rank = data.draw(st.integers(1, min(rows, columns)))
    given_matrix = matrix(rows, columns, dtype, seed)
    found = svd(given_matrix, rank)
    exact = torch.linalg.svdvals(given_matrix.double())
    torch.testing.assert_close(
        found.singular_values.double(), exact[:rank], rtol=1e-5, atol=1e-5 * exact[0].item()
    )
    best = float(exact[rank:].square().sum().sqrt() / exact.norm())
    assert found.relative_error(given_matrix) == pytest.approx(best, abs=TOLERANCE[dtype])
    assert found.n_parameters == rank * (rows + columns)


@given(sides, sides, dtypes, seeds)
def test_factors_are_orthonormal(rows, columns, dtype, seed) -> None:
    found = svd(matrix(rows, columns, dtype, seed))
    identity = torch.eye(found.ranks[0], dtype=dtype)
    for gram in (found.u.mT @ found.u, found.vh @ found.vh.mT):
        torch.testing.assert_close(gram, identity, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rows_of_singular_values_that_are_not_zero_are_orthonormal(dtype) -> None:
    """Also of a matrix of low rank, whose last singular values are rounding."""
    found = svd(matrix(30, 3, dtype, 0) @ matrix(3, 40, dtype, 1))
    rows = found.vh[found.singular_values > 0]
    torch.testing.assert_close(rows @ rows.mT, torch.eye(len(rows), dtype=dtype), rtol=0, atol=1e-4)


@given(sides, sides, seeds, st.integers(1, 5))
def test_rank_deficient_matrices_are_recovered_at_their_rank(rows, columns, seed, rank) -> None:
    rank = min(rank, rows, columns)
    low = matrix(rows, rank, torch.float32, seed) @ matrix(rank, columns, torch.float32, seed + 1)
    assert svd(low, rank).relative_error(low) < 5e-6


@given(sides, sides, dtypes, seeds)
def test_balanced_factors_share_the_norm_and_multiply_to_the_matrix(
    rows, columns, dtype, seed
) -> None:
    found = svd(matrix(rows, columns, dtype, seed))
    left, right = found.balanced()
    torch.testing.assert_close(left @ right, found.to_tensor(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype) -> None:
    given_matrix = matrix(20, 30, dtype, 0)
    found = svd(given_matrix)
    assert found.u.dtype == torch.float32
    assert found.relative_error(given_matrix) < 2e-6


def test_zero_and_badly_conditioned_matrices() -> None:
    zero = svd(torch.zeros(5, 7))
    assert zero.relative_error(torch.zeros(5, 7)) == 0
    assert torch.isfinite(zero.vh).all()
    spread = matrix(30, 30, torch.float32, 0) * torch.logspace(0, -12, 30)
    assert svd(spread).relative_error(spread) < 2e-6


def test_views_are_taken_as_they_are() -> None:
    given_matrix = matrix(30, 20, torch.float32, 0)
    torch.testing.assert_close(
        svd(given_matrix.mT).singular_values, svd(given_matrix).singular_values
    )


@given(sides, sides, dtypes, seeds, st.floats(0.01, 0.99))
def test_energy_and_tolerance_are_kept_by_the_least_rank(rows, columns, dtype, seed, share) -> None:
    given_matrix = matrix(rows, columns, dtype, seed)
    by_tolerance = svd(given_matrix, tolerance=share)
    assert by_tolerance.relative_error(given_matrix) <= share + TOLERANCE[dtype]
    by_energy = svd(given_matrix, energy=1 - share**2)
    assert by_energy.ranks == by_tolerance.ranks
    if by_tolerance.ranks[0] > 1:
        less = by_tolerance.truncate(by_tolerance.ranks[0] - 1)
        assert less.relative_error(given_matrix) > share - TOLERANCE[dtype]


@given(sides, sides, dtypes, seeds, st.integers(1, 5))
def test_full_rank_factorization_finds_the_numerical_rank(rows, columns, dtype, seed, rank) -> None:
    rank = min(rank, rows, columns)
    low = matrix(rows, rank, dtype, seed) @ matrix(rank, columns, dtype, seed + 1)
    found = full_rank(low)
    assert found.ranks[0] <= rank
    left, right = found.balanced()
    torch.testing.assert_close(left @ right, low, rtol=1e-4, atol=1e-4)
    assert full_rank(torch.zeros(rows, columns)).ranks == (1,)


def test_one_criterion_at_most() -> None:
    with pytest.raises(ValueError, match="at most one"):
        svd(torch.randn(3, 3), 2, energy=0.5)


@pytest.mark.parametrize("rank", [0, -1, 6])
def test_impossible_ranks_are_refused(rank) -> None:
    with pytest.raises(RankError, match=r"outside 1\.\.5"):
        svd(torch.randn(5, 8), rank)


def test_what_is_no_finite_matrix_is_refused() -> None:
    for tensor in (torch.randn(3), torch.randn(2, 3, 4), torch.randn(0, 3)):
        with pytest.raises(RankError, match="non-empty matrix"):
            svd(tensor)
    for value in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="2x3 holds NaN or infinity"):
            svd(torch.full((2, 3), value))
    with pytest.raises(ValueError, match="int64"):
        svd(torch.ones(2, 3, dtype=torch.int64))
