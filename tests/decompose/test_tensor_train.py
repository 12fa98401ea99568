import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensors import weight_of

from rankfold.decompose import TensorTrain, svd, tensor_train, tensor_train_matrix
from rankfold.decompose.unfolding import unfold
from rankfold.errors import RankError, TensorError

TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-13}
shapes = st.lists(st.integers(1, 6), min_size=2, max_size=5).map(tuple)
dtypes = st.sampled_from(list(TOLERANCE))
seeds = st.integers(0, 1000)


def tensor_of(shape, dtype=torch.float64, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def smooth(shape, dtype=torch.float64) -> torch.Tensor:
    """1 / (1 + i1 + ... + id): its unfoldings have quickly decaying spectra."""
    grids = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in shape), indexing="ij")
    return (1 / (1 + sum(grids))).to(dtype)


@given(shapes, dtypes, seeds)
def test_exact_without_truncation(shape, dtype, seed) -> None:
    tensor = tensor_of(shape, dtype, seed)
    found = tensor_train(tensor)
    assert found.shape == shape and found.cores[0].dtype == dtype
    assert found.relative_error(tensor) < TOLERANCE[dtype]
    assert found.n_parameters == sum(core.numel() for core in found.cores)
    for core in found.cores[:-1]:
        left = core.flatten(0, 1)
        torch.testing.assert_close(
            left.mT @ left, torch.eye(core.shape[2], dtype=dtype), rtol=0, atol=1e-5
        )


@given(shapes, dtypes, seeds, st.floats(0.001, 0.9))
def test_tolerance_is_kept(shape, dtype, seed, tolerance) -> None:
    for tensor in (tensor_of(shape, dtype, seed), smooth(shape, dtype)):
        found = tensor_train(tensor, tolerance=tolerance)
        assert found.relative_error(tensor) <= tolerance + TOLERANCE[dtype]
        rounded = tensor_train(tensor).round(tolerance=tolerance)
        assert rounded.relative_error(tensor) <= tolerance + TOLERANCE[dtype]


@given(shapes, seeds, st.integers(1, 4))
def test_a_train_of_these_ranks_is_recovered(shape, seed, rank) -> None:
    ends = [1, *([rank] * (len(shape) - 1)), 1]
    cores = [tensor_of((ends[k], n, ends[k + 1]), seed=seed + k) for k, n in enumerate(shape)]
    train = TensorTrain(tuple(cores))
    tensor = train.to_tensor()
    assert tensor_train(tensor, rank).relative_error(tensor) < 1e-7
    assert train.round(tolerance=1e-6).relative_error(tensor) < 1e-5
    assert all(r <= rank for r in tensor_train(tensor, tolerance=1e-6).ranks)
    assert train.norm() == pytest.approx(tensor.norm().item())
    assert train.right_orthogonal().relative_error(tensor) < 1e-12


@given(shapes, seeds, st.integers(1, 4))
def test_error_is_within_the_bound_of_the_unfoldings(shape, seed, rank) -> None:
    """Oseledets 2011, theorem 2.2: the squared error is at most the sum over the unfoldings."""
    tensor = tensor_of(shape, seed=seed)
    bound = 0.0
    for k in range(1, len(shape)):
        unfolding = tensor.reshape(math.prod(shape[:k]), -1)
        truncated = svd(unfolding, min(rank, *unfolding.shape))
        bound += truncated.relative_error(unfolding) ** 2
    assert tensor_train(tensor, rank).relative_error(tensor) ** 2 <= bound + 1e-12


@given(seeds, st.integers(1, 6))
def test_of_a_matrix_it_is_the_svd(seed, rank) -> None:
    matrix = tensor_of((6, 9), seed=seed)
    best = svd(matrix, rank).relative_error(matrix)
    assert tensor_train(matrix, rank).relative_error(matrix) == pytest.approx(best, abs=1e-12)


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=2, max_size=4), dtypes, seeds
)
def test_matrices_in_paired_modes(pairs, dtype, seed) -> None:
    rows, columns = (tuple(side) for side in zip(*pairs, strict=True))
    matrix = tensor_of((math.prod(rows), math.prod(columns)), dtype, seed)
    found = tensor_train_matrix(matrix, rows, columns)
    assert found.relative_error(matrix) < TOLERANCE[dtype]
    assert [core.shape[1:3] for core in found.cores] == pairs


def test_a_kronecker_product_is_a_train_of_rank_one() -> None:
    factors = [tensor_of((2, 3)), tensor_of((4, 2), seed=1), tensor_of((3, 5), seed=2)]
    matrix = torch.kron(torch.kron(factors[0], factors[1]), factors[2])
    found = tensor_train_matrix(matrix, (2, 4, 3), (3, 2, 5), tolerance=1e-9)
    assert found.ranks == (1, 1)
    assert found.relative_error(matrix) < 1e-12


def test_weights_of_single_modes_are_those_of_their_pairs() -> None:
    """The norm of the error is the weighted one: at a low rank it is lower than without."""
    modes = (2, 4, 3), (3, 2, 5)
    matrix = tensor_of((24, 30))
    rows = {0: weight_of(2), 2: weight_of(3)}
    columns = {1: weight_of(2, 1), 2: weight_of(5)}
    whole = [torch.ones(1, 1, dtype=torch.float64) for _ in modes]
    for side, weights in enumerate((rows, columns)):
        for k, length in enumerate(modes[side]):
            identity = torch.eye(length, dtype=torch.float64)
            whole[side] = torch.kron(whole[side], weights.get(k, identity))

    def error(found) -> float:
        missed = found.to_tensor() - matrix
        return torch.einsum("ij,ik,kl,jl->", missed, whole[0], missed, whole[1]).item()

    plain = tensor_train_matrix(matrix, *modes, ranks=3)
    weighted = tensor_train_matrix(
        matrix, *modes, ranks=3, row_weights=rows, column_weights=columns
    )
    assert error(weighted) < error(plain)
    exact = tensor_train_matrix(matrix, *modes, row_weights=rows, column_weights=columns)
    assert exact.relative_error(matrix) < 1e-10


def test_views_half_precision_and_zeros() -> None:
    tensor = tensor_of((4, 5, 6)).permute(2, 0, 1)
    assert tensor_train(tensor).relative_error(tensor) < 1e-13
    half = tensor_of((4, 5, 6), torch.bfloat16)
    assert tensor_train(half).relative_error(half) < 1e-5
    zero = torch.zeros(3, 4, 5)
    for found in (tensor_train(zero), tensor_train(zero, tolerance=0.1), tensor_train(zero, 1)):
        assert found.relative_error(zero) == 0
    assert tensor_train(zero, tolerance=0.1).ranks == (1, 1)
    assert unfold(tensor_train(tensor, 2).to_tensor(), 0).shape == (6, 20)


@pytest.mark.parametrize("ranks", [0, (1,), (1, 2, 3), (2, 0)])
def test_impossible_ranks_are_refused(ranks) -> None:
    with pytest.raises(RankError, match="2 ranks of at least 1"):
        tensor_train(torch.randn(3, 4, 5), ranks)


def test_what_makes_no_sense_is_refused() -> None:
    tensor = torch.randn(3, 4, 5)
    with pytest.raises(ValueError, match="at most one"):
        tensor_train(tensor, 2, 0.1)
    with pytest.raises(ValueError, match="tolerance"):
        tensor_train(tensor, tolerance=1.0)
    with pytest.raises(RankError, match="two modes or more"):
        tensor_train(torch.randn(3))
    with pytest.raises(TensorError, match="NaN"):
        tensor_train(torch.full((3, 3), torch.nan))
    with pytest.raises(RankError, match="do not fit 6x6"):
        tensor_train_matrix(torch.randn(6, 6), (2, 3), (2, 2))
    with pytest.raises(RankError, match="do not fit"):
        tensor_train_matrix(torch.randn(6, 6), (6,), (6,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [20, 300])
def test_a_large_unfolding_keeps_the_tolerance_with_and_without_a_sketch(dtype, rank) -> None:
    """Of rank 20 a sketch finds all; of rank 300 it does not, and the eigenvectors are taken."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 600, rank, dtype=dtype, generator=generator)
    noise = torch.randn(600, 600, dtype=dtype, generator=generator)
    tensor = left @ right.mT + 1e-3 * noise
    found = tensor_train(tensor, tolerance=0.01)
    assert found.relative_error(tensor) <= 0.01
    assert found.ranks[0] <= svd(tensor, tolerance=0.01).ranks[0] + 1
    core = found.cores[0][0]
    torch.testing.assert_close(core.mT @ core, torch.eye(found.ranks[0], dtype=dtype))
