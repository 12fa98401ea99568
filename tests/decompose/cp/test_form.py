import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensors import seeds, tensor_of

from rankfold.decompose.cp import CP, from_factors, khatri_rao
from rankfold.errors import RankError

shapes = st.lists(st.integers(1, 6), min_size=2, max_size=4).map(tuple)


def factors_of(shape: tuple[int, ...], rank: int, seed: int) -> list[torch.Tensor]:
    return [tensor_of((length, rank), seed=seed + mode) for mode, length in enumerate(shape)]


@given(shapes, st.integers(1, 5), seeds)
def test_it_is_the_sum_of_outer_products(shape, rank, seed) -> None:
    factors = factors_of(shape, rank, seed)
    found = from_factors(factors)
    expected = torch.zeros(shape, dtype=torch.float64)
    for r in range(rank):
        term = torch.ones(1, dtype=torch.float64)
        for factor in factors:
            term = torch.kron(term, factor[:, r])
        expected += term.reshape(shape)
    torch.testing.assert_close(found.to_tensor(), expected)
    assert found.ranks == (rank,) and found.n_parameters == rank * sum(shape)
    assert (found.norms[:-1] >= found.norms[1:]).all()
    for factor in found.factors:
        torch.testing.assert_close(factor.norm(dim=0), torch.ones(rank, dtype=torch.float64))
    heaviest = found.truncate(1)
    term = expected if rank == 1 else heaviest.to_tensor()
    assert term.norm().item() == pytest.approx(found.norms[0].item())


@given(shapes, st.integers(1, 5), seeds)
def test_balanced_factors_give_the_same_with_equal_norms(shape, rank, seed) -> None:
    found = from_factors(factors_of(shape, rank, seed))
    balanced = list(found.balanced())
    torch.testing.assert_close(from_factors(balanced).to_tensor(), found.to_tensor())
    for factor in balanced[1:]:
        torch.testing.assert_close(factor.norm(dim=0), balanced[0].norm(dim=0))


def test_sensitivity_is_the_sum_of_the_squared_norms_of_the_terms() -> None:
    found = CP(torch.tensor([3.0, 1.0]), (torch.eye(2), torch.eye(2), torch.eye(2)))
    assert found.sensitivity == 10


def test_a_term_of_zero_stays_zero() -> None:
    found = from_factors([torch.tensor([[0.0, 1.0]]), torch.ones(3, 2)])
    assert found.norms.tolist() == pytest.approx([3**0.5, 0.0])
    assert torch.isfinite(found.to_tensor()).all()


def test_khatri_rao_is_the_kronecker_product_of_columns() -> None:
    factors = factors_of((2, 3, 4), 5, 0)
    product = khatri_rao(factors)
    for r in range(5):
        one = torch.kron(torch.kron(factors[0][:, r], factors[1][:, r]), factors[2][:, r])
        torch.testing.assert_close(product[:, r], one)


@pytest.mark.parametrize("rank", [0, 3])
def test_impossible_truncations_are_refused(rank) -> None:
    with pytest.raises(RankError, match=r"outside 1\.\.2"):
        from_factors(factors_of((3, 4), 2, 0)).truncate(rank)
