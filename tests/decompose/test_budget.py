import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensors import seeds, tensor_of

from rankfold.decompose.budget import Budget, energies


@given(seeds, st.floats(0.01, 0.95), st.integers(1, 4))
def test_what_is_lost_is_within_the_share_and_paid_for(seed, tolerance, truncations) -> None:
    batch = tensor_of((3, 8, 10), seed=seed)
    squares = torch.linalg.svdvals(batch).square()
    budget = Budget.of(batch, tolerance, batch_dims=1)
    before = budget.left.clone()
    torch.testing.assert_close(before, tolerance**2 * squares.sum(1))
    rank = budget.truncate(squares, 8, truncations)
    lost = squares[:, rank:].sum(1)
    assert (lost <= before / truncations * (1 + 1e-9)).all()
    torch.testing.assert_close(budget.left, before - lost)
    if rank > 1:
        assert (squares[:, rank - 1 :].sum(1) > before / truncations).any()


def test_without_a_tolerance_the_limit_decides() -> None:
    budget = Budget.of(tensor_of((3, 4)), None)
    assert budget.left is None and budget.truncate(torch.ones(3), 2) == 2
    assert not budget.is_coarse(tensor_of((3, 4)))


def test_nothing_may_be_lost_at_tolerance_zero() -> None:
    budget = Budget.of(tensor_of((3, 4)), 0.0)
    assert budget.truncate(torch.tensor([1.0, 1e-200, 0.0], dtype=torch.float64), 3) == 2
    assert not budget.is_coarse(tensor_of((3, 4)))
    assert Budget.of(tensor_of((3, 4)), 1e-3).is_coarse(tensor_of((3, 4)))


def test_refusals_and_energies() -> None:
    for tolerance in (-0.1, 1.0):
        with pytest.raises(ValueError, match="tolerance"):
            Budget.of(tensor_of((3, 4)), tolerance)
    assert energies(torch.ones(2, 3, 4), 1).tolist() == [12, 12]
    assert energies(torch.ones(2, 3, 4)).tolist() == [24]
