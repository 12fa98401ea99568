"""Weights that are the same along their diagonals, nearest to a weight in any metric."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from structured import check_saved
from tensors import seeds, tensor_of, weight_of
from torch import nn

from rankfold.layers import CirculantLinear, HankelLinear, ToeplitzLinear
from rankfold.methods import METHODS, WEIGHT_METRIC, Moments

FORMS = {"circulant": CirculantLinear, "toeplitz": ToeplitzLinear, "hankel": HankelLinear}
names, features = st.sampled_from(sorted(FORMS)), st.integers(1, 12)


def linear(inputs: int, outputs: int, seed: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, dtype=torch.float64)
    layer.weight.data.copy_(tensor_of((outputs, inputs), seed=seed))
    return layer


def basis_of(name: str, inputs: int, outputs: int) -> torch.Tensor:
    """The weight that each number makes by itself: (numbers, out, in)."""
    form = FORMS[name](inputs, outputs, dtype=torch.float64)
    weights = []
    with torch.no_grad():
        for one in torch.eye(form.period, dtype=torch.float64):
            form.factors[0].copy_(one)
            weights.append(form.to_weight().clone())
    return torch.stack(weights)


@given(names, features, features, seeds)
def test_what_has_the_form_is_found(name, inputs, outputs, seed) -> None:
    torch.manual_seed(seed)
    exact = FORMS[name](inputs, outputs, dtype=torch.float64).to_dense()
    family = METHODS[name]().fit(exact, WEIGHT_METRIC)
    torch.testing.assert_close(family.build((1,)).to_dense().weight, exact.weight)
    assert family.loss((1,)) < 1e-20


@given(names, features, features, st.booleans(), st.booleans(), seeds)
def test_it_is_the_least_squares_solution_in_the_metric(
    name, inputs, outputs, knows_inputs, knows_gradients, seed
) -> None:
    """Of all entries, whitened, as a linear system of the numbers."""
    layer = linear(inputs, outputs, seed)
    moments = Moments(
        weight_of(inputs, seed=seed + 1) if knows_inputs else None,
        weight_of(outputs, seed=seed + 2) if knows_gradients else None,
    )
    family = METHODS[name]().fit(layer, moments)
    left, right = (
        torch.eye(length).double() if moment is None else torch.linalg.cholesky(moment)
        for moment, length in ((moments.gradients, outputs), (moments.inputs, inputs))
    )
    left = left.mT
    system = (left @ basis_of(name, inputs, outputs) @ right).flatten(1).mT
    wanted = (left @ layer.weight.detach() @ right).flatten()
    numbers = torch.linalg.lstsq(system, wanted[:, None], driver="gelsd").solution
    least = (system @ numbers - wanted[:, None]).square().sum() / wanted.square().sum()
    assert family.loss((1,)) == pytest.approx(least.item(), rel=1e-6, abs=1e-9)
    difference = family.build((1,)).to_weight().detach() - layer.weight.detach()
    error = moments.squared_error(difference) / moments.squared_error(layer.weight.detach())
    assert error == pytest.approx(least.item(), rel=1e-6, abs=1e-9)


def test_in_the_weight_metric_numbers_are_means_of_diagonals() -> None:
    layer = linear(5, 4, seed=0)
    made = METHODS["toeplitz"]().fit(layer, WEIGHT_METRIC).build((1,)).to_weight().detach()
    for offset in range(-3, 5):
        mean = layer.weight.detach().diagonal(offset).mean()
        torch.testing.assert_close(made.diagonal(offset), mean.expand_as(made.diagonal(offset)))


@pytest.mark.parametrize("name", FORMS)
def test_a_network_with_it_is_saved_and_loaded(name, tmp_path) -> None:
    check_saved(name, (1,), tmp_path)


@pytest.mark.parametrize("name", FORMS)
def test_convolutions_are_left_to_others(name) -> None:
    assert "no factorization for Conv2d" in METHODS[name]().why_not(nn.Conv2d(4, 4, 1))
