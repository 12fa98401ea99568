import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensors import seeds, tensor_of, weight_of

from rankfold.decompose import symmetric_roots


@given(st.integers(1, 12), seeds)
def test_roots_of_a_regular_matrix(length, seed) -> None:
    matrix = weight_of(length, seed)
    found = symmetric_roots(matrix)
    assert found.raised == 0
    torch.testing.assert_close(found.root @ found.root, matrix)
    identity = torch.eye(length, dtype=torch.float64)
    torch.testing.assert_close(found.root @ found.inverse_root, identity, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.root, found.root.mT)


@given(st.integers(2, 12), seeds, st.sampled_from([1e-12, 1e-4]))
def test_a_singular_matrix_is_raised_to_the_floor(length, seed, floor) -> None:
    matrix = weight_of(length, seed, rank=length // 2)
    found = symmetric_roots(matrix, floor)
    assert found.raised >= length - length // 2
    squared = torch.linalg.eigvalsh(found.root @ found.root)
    assert squared[0] >= 0.9 * floor * squared[-1]
    torch.testing.assert_close(
        found.root @ found.root, matrix, rtol=0, atol=2 * floor * squared[-1].item() + 1e-10
    )


def test_batches_zeros_and_single_precision() -> None:
    batch = torch.stack([weight_of(4, seed).float() for seed in range(3)])
    found = symmetric_roots(batch)
    assert found.root.dtype == torch.float64 and found.root.shape == (3, 4, 4)
    for member, one in zip(found.root, batch, strict=True):
        torch.testing.assert_close(member, symmetric_roots(one).root)
    zero = symmetric_roots(torch.zeros(3, 3))
    assert torch.equal(zero.root, torch.eye(3, dtype=torch.float64)) and zero.raised == 3


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_rounding_is_judged_by_the_size_of_the_matrix(scale) -> None:
    assert symmetric_roots(scale * torch.diag(torch.tensor([1.0, -1e-6]))).raised == 1
    with pytest.raises(ValueError, match="positive semidefinite"):
        symmetric_roots(scale * torch.diag(torch.tensor([1.0, -1e-3])))


def test_what_has_no_root_is_refused() -> None:
    for matrix, message in (
        (torch.randn(3), "square"),
        (torch.randn(3, 4), "square"),
        (torch.randn(0, 0), "square"),
        (tensor_of((3, 3)), "not symmetric"),
        (torch.diag(torch.tensor([1.0, -0.1])), "positive semidefinite.*-0.1"),
        (torch.full((2, 2), torch.inf), "NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=message):
            symmetric_roots(matrix)
    for floor in (0.0, -1.0, 1.5):
        with pytest.raises(ValueError, match="floor"):
            symmetric_roots(torch.eye(2), floor)
