import pytest
import torch
from geometry import FEATURES
from hypothesis import given, settings
from hypothesis import strategies as st
from structured import (
    ROUNDING,
    check_gradients,
    check_initial_scale,
    check_initial_variance,
    check_product,
    check_programs,
)

from rankfold.layers import CirculantLinear, HankelLinear, ToeplitzLinear

FORMS = [CirculantLinear, ToeplitzLinear, HankelLinear]


@pytest.mark.parametrize("sides", [(1, 1), (7, 5), (5, 7), (12, 12), (13, 13), (1, 4), (4, 1)])
def test_the_weight_is_that_of_the_definition(sides) -> None:
    inputs, outputs = sides
    layers = [form(*sides) for form in FORMS]
    (c,), (t,), (h,) = (layer.factors for layer in layers)
    for i in range(outputs):
        for j in range(inputs):
            # Numbers of negative places are stored at the end.
            expected = c[(i - j) % max(sides)], t[i - j], h[i + j - (inputs - 1)]
            assert tuple(layer.to_weight()[i, j] for layer in layers) == expected


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(FORMS),
    FEATURES,
    FEATURES,
    st.booleans(),
    st.sampled_from(list(ROUNDING)),
    st.sampled_from([(), (1,), (0,), (2, 3), (5, 0)]),
)
def test_the_product_is_that_with_the_weight(form, inputs, outputs, bias, dtype, leading) -> None:
    check_product(form(inputs, outputs, bias), dtype, leading)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sides", [(8, 5), (7, 11), (1, 1)])
def test_gradients(form, sides) -> None:
    check_gradients(form(*sides))


@pytest.mark.parametrize("form", FORMS)
def test_it_is_cast_compiled_and_exported(form) -> None:
    check_programs(form(11, 7))


@pytest.mark.parametrize("form", FORMS)
def test_activations_keep_their_scale(form) -> None:
    """An offset of all inputs, as behind a ReLU, stays one: of one layer the mean over draws."""
    check_initial_scale(form)
    check_initial_scale(form, relu=True, layers=1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sides", [(32, 32), (24, 40), (40, 24)])
def test_the_initial_variance(form, sides) -> None:
    check_initial_variance(form, sides)


def test_a_circulant_layer_of_equal_sides_is_orthogonal_at_first() -> None:
    weight = CirculantLinear(15, 15).to_weight()
    torch.testing.assert_close(weight @ weight.mT, torch.eye(15), rtol=0, atol=1e-5)
