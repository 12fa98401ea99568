import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensors import tensor_of

from rankfold.layers import CirculantLinear, HankelLinear, ToeplitzLikeLinear, ToeplitzLinear
from rankfold.layers.fourier import fast_length, random_phases, toeplitz

MADE = [
    lambda: CirculantLinear(9, 7),
    lambda: ToeplitzLinear(9, 7),
    lambda: HankelLinear(9, 7),
    lambda: ToeplitzLikeLinear(9, 7, 3),
]


@given(st.integers(1, 5000))
def test_a_fast_length_is_the_next_with_small_factors(length) -> None:
    found = fast_length(length)

    def is_smooth(number: int) -> bool:
        for factor in (2, 3, 5):
            while number % factor == 0:
                number //= factor
        return number == 1

    assert found >= length and is_smooth(found)
    assert not any(map(is_smooth, range(length, found)))


@given(st.integers(1, 12), st.integers(1, 12))
def test_a_toeplitz_matrix_has_its_numbers_on_the_diagonals(rows, columns) -> None:
    numbers = torch.arange(2.0 * (rows + columns - 1)).reshape(2, -1)
    made = toeplitz(numbers, columns)
    assert made.shape == (2, rows, columns)
    for i in range(rows):
        for j in range(columns):
            assert torch.equal(made[:, i, j], numbers[:, i - j + columns - 1])


@pytest.mark.parametrize("length", [1, 2, 15, 16])
def test_random_phases_make_orthogonal_circulant_matrices(length) -> None:
    (row,) = random_phases(length, torch.empty(1, length))
    matrix = torch.stack([row.roll(k) for k in range(length)])
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(length), rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", MADE)
def test_spectra_are_kept_until_the_layer_is_trained(make) -> None:
    layer, rows = make().eval(), tensor_of((3, 9), torch.float32)
    layer.keep_spectra(True)
    expected = layer(rows)
    assert layer.kept is None  # a gradient may be asked for
    with torch.no_grad():
        assert torch.equal(layer(rows), expected) and layer.kept is not None
        kept = layer.kept
        assert torch.equal(layer(rows), expected) and layer.kept is kept
        layer.factors[0].mul_(2)
        assert torch.equal(layer(rows), expected)  # as was asked for
        layer.train()
        assert layer.kept is None and not torch.equal(layer(rows), expected)
        assert layer.kept is None
        layer.eval()(rows)
        layer.load_state_dict(make().state_dict())
        assert layer.kept is None
        layer(rows)
        assert layer.double()(rows.double()).dtype == torch.float64
        layer.keep_spectra(False)
        layer(rows.double())
        assert layer.kept is None


@pytest.mark.parametrize("make", MADE)
def test_kept_spectra_do_not_stand_in_the_way_of_gradients(make) -> None:
    layer, rows = make().eval(), tensor_of((3, 9), torch.float32)
    layer.keep_spectra(True)
    with torch.no_grad():
        layer(rows)
    layer(rows).square().sum().backward()
    assert all(factor.grad.abs().sum() > 0 for factor in layer.factors)


@pytest.mark.parametrize("make", MADE)
def test_the_weight_written_out_is_multiplied_by_on_demand(make) -> None:
    layer, rows = make().eval(), tensor_of((3, 9), torch.float32)
    expected = layer(rows)
    layer.use_weight(True)
    torch.testing.assert_close(layer(rows), expected)
