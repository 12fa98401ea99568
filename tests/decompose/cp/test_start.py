import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensors import seeds, tensor_of

from rankfold.decompose.cp.form import multiply_out
from rankfold.decompose.cp.start import compress, exact_factors, exact_rank, start_factors
from rankfold.decompose.unfolding import mode_product, unfold
from rankfold.errors import RankError


def exact_tensor(shape: tuple[int, ...], rank: int, seed: int) -> torch.Tensor:
    return multiply_out([tensor_of((n, rank), seed=seed + k) for k, n in enumerate(shape)])


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@given(st.sampled_from([(8, 7, 6), (9, 4, 8), (6, 3, 2, 7)]), st.integers(1, 6), seeds)
def test_the_eigenvalue_start_solves_exact_tensors(shape, rank, seed) -> None:
    tensor = exact_tensor(shape, rank, seed)
    found = start_factors(tensor, rank, "eigenvalue", generator())
    assert [factor.shape for factor in found] == [(length, rank) for length in shape]
    # Random terms can come out nearly dependent, and the eigenvectors with them.
    assert (multiply_out(found) - tensor).norm() < 1e-3 * tensor.norm()


def test_conjugate_eigenvectors_give_real_factors() -> None:
    found = start_factors(tensor_of((6, 6, 6)), 6, "eigenvalue", generator())
    assert all(torch.isfinite(factor).all() and not factor.is_complex() for factor in found)


def test_the_hosvd_start_is_the_leading_singular_vectors_filled_up() -> None:
    tensor = tensor_of((6, 5, 2))
    found = start_factors(tensor, 4, "hosvd", generator())
    for mode in (0, 1):
        exact = torch.linalg.svd(unfold(tensor, mode)).U[:, :4]
        torch.testing.assert_close(found[mode].abs(), exact.abs())
    assert found[2].shape == (2, 4) and torch.linalg.matrix_rank(found[2]) == 2


def test_the_random_start_is_that_of_the_seed() -> None:
    tensor = tensor_of((3, 4, 5))
    first, again = (start_factors(tensor, 2, "random", generator()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@given(st.lists(st.integers(1, 5), min_size=2, max_size=4).map(tuple), seeds)
def test_exact_factors_are_the_tensor(shape, seed) -> None:
    tensor = tensor_of(shape, seed=seed)
    found = exact_factors(tensor)
    assert all(factor.shape[1] == exact_rank(tensor) for factor in found)
    torch.testing.assert_close(multiply_out(found), tensor)


@given(st.integers(1, 4), seeds)
def test_compression_loses_nothing_of_a_tensor_of_this_rank(rank, seed) -> None:
    tensor = exact_tensor((8, 3, 7), rank, seed)
    core, bases = compress(tensor, rank)
    assert core.shape == tuple(min(rank, length) for length in (8, 3, 7))
    for mode, basis in bases.items():
        core = mode_product(core, basis, mode)
    torch.testing.assert_close(core, tensor, rtol=1e-6, atol=1e-6)


def test_what_cannot_start_is_refused() -> None:
    with pytest.raises(RankError, match="two of them at least 5 long, not 6x4x3"):
        start_factors(tensor_of((6, 4, 3)), 5, "eigenvalue", generator())
    with pytest.raises(RankError, match="three modes"):
        start_factors(tensor_of((6, 6)), 2, "eigenvalue", generator())
    with pytest.raises(ValueError, match="'best'"):
        start_factors(tensor_of((6, 6)), 2, "best", generator())
