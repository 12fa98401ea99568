import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensors import tensor_of

from rankfold.decompose import randomized_svd, residual_norm_bound, svd
from rankfold.errors import RankError, TensorError

dtypes = st.sampled_from([torch.float32, torch.float64])
seeds = st.integers(0, 1000)


def decaying(rows: int, columns: int, decay: float, dtype=torch.float64, seed=0) -> torch.Tensor:
    """A matrix with singular values 1, decay, decay², ..."""
    generator = torch.Generator().manual_seed(seed)
    full = min(rows, columns)
    left, right = (
        torch.linalg.qr(torch.randn(n, full, dtype=torch.float64, generator=generator)).Q
        for n in (rows, columns)
    )
    return ((left * decay ** torch.arange(full)) @ right.mT).to(dtype)


@given(st.integers(20, 80), st.integers(20, 80), dtypes, seeds, st.booleans())
def test_fixed_rank_is_near_the_optimum(rows, columns, dtype, seed, block_krylov) -> None:
    matrix = decaying(rows, columns, 0.8, dtype, seed)
    found = randomized_svd(matrix, 8, block_krylov=block_krylov, seed=seed)
    assert found.ranks == (8,) and found.u.dtype == dtype
    assert found.relative_error(matrix) <= 1.01 * svd(matrix, 8).relative_error(matrix)
    for gram in (found.u.mT @ found.u, found.vh @ found.vh.mT):
        torch.testing.assert_close(gram, torch.eye(8, dtype=dtype), rtol=0, atol=1e-4)


@given(st.integers(5, 90), st.integers(5, 90), dtypes, seeds, st.sampled_from([0.5, 0.1, 1e-3]))
def test_tolerance_is_kept_by_the_least_rank_or_nearly(
    rows, columns, dtype, seed, tolerance
) -> None:
    matrix = decaying(rows, columns, 0.8, dtype, seed)
    found = randomized_svd(matrix, tolerance=tolerance, seed=seed)
    assert found.relative_error(matrix) <= tolerance * (1 + 1e-3)
    assert found.ranks[0] <= svd(matrix, tolerance=tolerance).ranks[0] + 1


@given(seeds, st.integers(1, 12))
def test_exact_rank_is_recovered(seed, rank) -> None:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(70, rank, generator=generator, dtype=torch.float64)
    matrix = left @ torch.randn(rank, 50, generator=generator, dtype=torch.float64)
    assert randomized_svd(matrix, rank, seed=seed).relative_error(matrix) < 1e-12
    assert randomized_svd(matrix, tolerance=1e-5, seed=seed).ranks[0] <= rank


def test_block_krylov_does_better_where_the_spectrum_is_flat() -> None:
    matrix = decaying(200, 150, 0.99)
    errors = [
        randomized_svd(matrix, 10, oversampling=2, block_krylov=krylov).relative_error(matrix)
        for krylov in (False, True)
    ]
    assert errors[1] < errors[0]


@given(seeds)
def test_error_bound_holds(seed) -> None:
    matrix = decaying(60, 40, 0.8, seed=seed)
    found = randomized_svd(matrix, 5, seed=seed)
    true = torch.linalg.matrix_norm(matrix - found.to_tensor(), 2).item()
    assert true <= residual_norm_bound(found, matrix, seed=seed) <= 100 * true


def test_the_same_seed_gives_the_same_and_leaves_randomness_alone() -> None:
    matrix, state = decaying(40, 30, 0.9), torch.get_rng_state()
    first, again, other = (randomized_svd(matrix, 3, seed=seed).u for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_degenerate_input() -> None:
    zero = torch.zeros(6, 4)
    assert randomized_svd(zero, 2).relative_error(zero) == 0
    assert randomized_svd(zero, tolerance=0.1).relative_error(zero) == 0
    column = torch.randn(7, 1)
    assert randomized_svd(column, 1).relative_error(column) < 1e-6
    half = torch.randn(9, 8).half()
    assert randomized_svd(half, 8).relative_error(half) < 1e-5


@pytest.mark.parametrize("arguments", [{"rank": 4}, {"tolerance": 1e-3}])
@pytest.mark.parametrize("iterations", [0, 2])
def test_every_member_of_a_batch_is_decomposed(arguments, iterations) -> None:
    batch = tensor_of((2, 3, 20, 4)) @ tensor_of((2, 3, 4, 15), seed=1)
    found = randomized_svd(batch, **arguments, iterations=iterations)
    assert found.u.shape == (2, 3, 20, 4)
    torch.testing.assert_close(found.to_tensor(), batch, rtol=0, atol=1e-8)


def test_what_makes_no_sense_is_refused() -> None:
    matrix = torch.randn(5, 8)
    for rank in (0, 6):
        with pytest.raises(RankError, match=r"1\.\.5"):
            randomized_svd(matrix, rank)
    with pytest.raises(RankError, match="non-empty matrix"):
        randomized_svd(torch.randn(3), 1)
    for arguments in ({}, {"rank": 2, "tolerance": 0.1}, {"tolerance": 1e-9}, {"tolerance": 2}):
        with pytest.raises(ValueError, match="tolerance"):
            randomized_svd(matrix, **arguments)
    for arguments in ({"oversampling": -1}, {"iterations": -1}):
        with pytest.raises(ValueError, match="must not be negative"):
            randomized_svd(matrix, 2, **arguments)
    with pytest.raises(TensorError, match="NaN"):
        randomized_svd(torch.full((3, 3), torch.nan), 1)
