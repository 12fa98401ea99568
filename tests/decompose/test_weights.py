import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensors import seeds, tensor_of, weight_of

from rankfold.decompose import svd
from rankfold.decompose.weights import Whitening


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple), seeds, st.data())
def test_the_norm_of_the_whitened_tensor_is_that_of_the_weights(shape, seed, data) -> None:
    modes = data.draw(st.sets(st.integers(0, len(shape) - 1)))
    weights = {mode: weight_of(shape[mode], seed + mode) for mode in modes}
    tensor = tensor_of(shape, seed=seed)
    dense = torch.ones(1, 1, dtype=torch.float64)
    for mode, length in enumerate(shape):
        dense = torch.kron(dense, weights.get(mode, torch.eye(length, dtype=torch.float64)))
    expected = (tensor.flatten() @ dense @ tensor.flatten()).item()
    whitened = Whitening.of(shape, weights).whiten(tensor)
    assert whitened.square().sum().item() == pytest.approx(expected, rel=1e-9)


def test_restoring_undoes_whitening() -> None:
    tensor, weights = tensor_of((4, 5)), {0: weight_of(4)}
    whitening = Whitening.of((4, 5), weights)
    whitened = whitening.whiten(tensor)
    torch.testing.assert_close(whitening.restore(whitened, 0), tensor)
    assert whitening.restore(tensor.mT, 1).data_ptr() == tensor.data_ptr()
    batch = tensor_of((3, 4, 5))
    for member, one in zip(whitening.whiten(batch, batch_dims=1), batch, strict=True):
        torch.testing.assert_close(member, whitening.whiten(one))


def test_without_weights_nothing_changes() -> None:
    tensor = tensor_of((4, 5), torch.float32)
    for weights in (None, {}):
        assert Whitening.of((4, 5), weights).whiten(tensor) is tensor


def test_what_a_singular_weight_ignores_is_followed_by_the_factors_of_the_rest() -> None:
    """Rows without weight are fitted to the columns' factor that the weighted rows choose."""
    matrix = tensor_of((6, 8))
    weight = torch.diag(torch.tensor([1.0, 1, 1, 0, 0, 0], dtype=torch.float64))
    found = svd(matrix, 2, weights={0: weight})
    top = svd(matrix[:3], 2)
    torch.testing.assert_close(found.to_tensor()[:3], top.to_tensor(), rtol=1e-5, atol=1e-5)
    expected = matrix[3:] @ top.vh.mT @ top.vh  # least squares
    torch.testing.assert_close(found.to_tensor()[3:], expected, rtol=1e-4, atol=1e-4)


def test_weights_name_their_mode_when_refused() -> None:
    with pytest.raises(ValueError, match="mode 2 of a tensor with 2 modes"):
        Whitening.of((3, 4), {2: torch.eye(3)})
    with pytest.raises(ValueError, match=r"mode 1, 4 long, has the shape \(3, 3\)"):
        Whitening.of((3, 4), {1: torch.eye(3)})
    with pytest.raises(ValueError, match=r"mode 0: .*not positive semidefinite"):
        Whitening.of((3, 4), {0: -torch.eye(3)})
