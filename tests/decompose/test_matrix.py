import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensors import seeds, tensor_of, weight_of

from rankfold.decompose import full_rank, svd
from rankfold.errors import RankError

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}
sides = st.integers(1, 40)
dtypes = st.sampled_from(list(TOLERANCE))


def matrix(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return tensor_of((rows, columns), dtype, seed)


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


def test_zero_and_badly_conditioned_matrices() -> None:
    zero = svd(torch.zeros(5, 7))
    assert zero.relative_error(torch.zeros(5, 7)) == 0
    assert torch.isfinite(zero.vh).all()
    spread = matrix(30, 30, torch.float32, 0) * torch.logspace(0, -12, 30)
    assert svd(spread).relative_error(spread) < 2e-6


@given(sides, sides, seeds, st.data())
def test_weighted_truncation_is_optimal(rows, columns, seed, data) -> None:
    """Against explicit whitening (the singular values beyond the rank are the weighted error)."""
    rank = data.draw(st.integers(1, min(rows, columns)))
    given_matrix = matrix(rows, columns, torch.float64, seed)
    weights = {0: weight_of(rows, seed), 1: weight_of(columns, seed + 1)}
    left, right = (torch.linalg.cholesky(weights[mode]) for mode in (0, 1))
    exact = torch.linalg.svdvals(left.mT @ given_matrix @ right)
    found = svd(given_matrix, rank, weights=weights)
    torch.testing.assert_close(found.singular_values, exact[:rank])
    best = float(exact[rank:].square().sum().sqrt() / exact.norm())
    assert found.relative_error(given_matrix, weights) == pytest.approx(best, abs=1e-7)
    torch.testing.assert_close(
        found.u.mT @ weights[0] @ found.u, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-6
    )


@given(st.integers(1, 4), sides, sides, dtypes, seeds)
def test_batches_are_as_if_one_by_one(members, rows, columns, dtype, seed) -> None:
    batch = tensor_of((members, 1, rows, columns), dtype, seed)
    found = svd(batch, 1)
    assert found.batch_dims == 2 and found.n_parameters == members * (rows + columns)
    for member, one in zip(found.to_tensor()[:, 0], batch[:, 0], strict=True):
        torch.testing.assert_close(member, svd(one, 1).to_tensor(), rtol=1e-3, atol=1e-3)
    within = svd(batch, tolerance=0.5)
    assert within.ranks[0] == max(svd(one, tolerance=0.5).ranks[0] for one in batch[:, 0])
    weights = {0: weight_of(rows), 1: weight_of(columns)}
    whole = svd(batch, weights=weights)
    assert whole.relative_error(batch) < 1e-4
    assert whole.truncate(1).relative_error(batch, weights) <= (
        svd(batch, 1).relative_error(batch, weights) + 1e-5
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gradients_are_those_of_lapack(dtype) -> None:
    given_matrix = matrix(6, 8, dtype, 0).requires_grad_()
    torch.autograd.gradcheck(lambda m: svd(m.double(), 3).to_tensor(), given_matrix.double())
    svd(given_matrix, 3).to_tensor().square().sum().backward()
    found = given_matrix.grad.clone()
    given_matrix.grad = None
    torch.linalg.svdvals(given_matrix)[:3].square().sum().backward()
    torch.testing.assert_close(found, given_matrix.grad, rtol=1e-4, atol=1e-4)


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


def test_what_is_no_matrix_is_refused() -> None:
    for tensor in (torch.randn(3), torch.randn(0, 3), torch.randn(2, 0, 3)):
        with pytest.raises(RankError, match="non-empty matrix"):
            svd(tensor)
