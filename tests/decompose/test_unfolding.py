import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensors import seeds, tensor_of

from rankfold.decompose.unfolding import (
    gram,
    halves,
    mode_gram,
    mode_product,
    project,
    split_point,
    unfold,
)

shapes = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)


@given(shapes, seeds, st.data(), st.integers(0, 2))
def test_mode_product_is_the_sum_over_the_mode(shape, seed, data, batch_dims) -> None:
    mode = data.draw(st.integers(0, len(shape) - 1))
    batch = (2, 3)[:batch_dims]
    tensor = tensor_of((*batch, *shape), seed=seed)
    matrix = tensor_of((4, shape[mode]), seed=seed + 1)
    expected = np.moveaxis(
        np.tensordot(matrix, tensor, axes=(1, batch_dims + mode)), 0, batch_dims + mode
    )
    found = mode_product(tensor, matrix, mode, batch_dims)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    unfolded = unfold(tensor, mode, batch_dims)
    torch.testing.assert_close(unfold(found, mode, batch_dims), matrix @ unfolded)
    torch.testing.assert_close(mode_gram(tensor, mode, batch_dims), unfolded @ unfolded.mT)


def test_a_wide_rest_is_multiplied_in_slices() -> None:
    tensor, matrix = tensor_of((2, 3, 4, 50)), tensor_of((5, 4), seed=1)
    expected = np.moveaxis(np.tensordot(matrix, tensor, axes=(1, 2)), 0, 2)
    np.testing.assert_allclose(mode_product(tensor, matrix, 2), expected, atol=1e-12)
    batched = tensor_of((2, 5, 4), seed=2)
    found = mode_product(tensor, batched, 1, batch_dims=1)
    for member, one, factor in zip(found, tensor, batched, strict=True):
        torch.testing.assert_close(member, mode_product(one, factor, 1))


@given(st.sampled_from([1, 100, 255, 256, 300, 512]), st.integers(0, 2))
def test_gram_of_many_rows(rows, batch_dims) -> None:
    matrix = tensor_of((*(2, 1)[:batch_dims], rows, 7))
    torch.testing.assert_close(gram(matrix), matrix @ matrix.mT)
    torch.testing.assert_close(gram(matrix), gram(matrix).mT)


def test_projection_on_all_modes_but_one() -> None:
    tensor = tensor_of((3, 4, 5))
    factors = [tensor_of((n, 2), seed=n) for n in (3, 5)]
    projected = project(tensor, factors, (0, 2), skip=0)
    torch.testing.assert_close(projected, mode_product(tensor, factors[1].mT, 2))
    assert project(tensor, factors, (0, 2)).shape == (2, 4, 2)


def test_the_split_is_in_the_middle_of_the_product() -> None:
    assert split_point((256, 256, 3, 3)) == 1
    assert split_point((3, 3, 256, 256)) == 3
    assert split_point((4, 4, 4, 4)) == 2
    assert split_point((5, 7)) == 1
    assert split_point((1, 1, 1)) in (1, 2)


def test_halves_are_as_even_as_can_be() -> None:
    assert halves((128, 1024, 64)) == ((1,), (0, 2))
    assert halves((256, 256, 3, 3)) == ((0, 2), (1, 3))
    assert halves((4, 4, 4, 4)) == ((0, 1), (2, 3))
    assert halves((5, 7)) == ((0,), (1,))
    first, last = halves((1, 1, 1))
    assert sorted(first + last) == [0, 1, 2] and 2 in last
