import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st
from tensors import collinear_factors, seeds, tensor_of

from rankfold.decompose.cp.als import alternate
from rankfold.decompose.cp.form import multiply_out
from rankfold.decompose.cp.nls import _Linearised, balanced, gauss_newton
from rankfold.decompose.cp.target import Target


def error(target: Target, factors: list[torch.Tensor]) -> float:
    return (target.residual(factors).squared_norm / target.squared_norm) ** 0.5


def jacobian(factors: list[torch.Tensor]) -> torch.Tensor:
    """Of the tensor with respect to all factors one below the other, as autograd has it."""
    lengths = [factor.shape[0] for factor in factors]

    def tensor(stacked: torch.Tensor) -> torch.Tensor:
        return multiply_out(list(stacked.split(lengths))).flatten()

    point = torch.cat(factors)
    return torch.autograd.functional.jacobian(tensor, point).reshape(-1, point.numel())


@given(st.lists(st.integers(1, 4), min_size=2, max_size=4).map(tuple), st.integers(1, 3), seeds)
def test_gradient_and_products_are_those_of_the_jacobian(shape, rank, seed) -> None:
    factors = [tensor_of((length, rank), seed=seed + k) for k, length in enumerate(shape)]
    residual = Target(tensor_of(shape, seed=seed)).residual(factors)
    model = _Linearised(factors, residual)
    j = jacobian(factors)
    torch.testing.assert_close(model.gradient.flatten(), j.mT @ residual.tensor.flatten())
    step = tensor_of(model.gradient.shape, seed=seed + 9)
    torch.testing.assert_close(model.product(step).flatten(), j.mT @ j @ step.flatten())
    lowered = (residual.tensor.flatten() + j @ step.flatten()).square().sum() / 2
    torch.testing.assert_close(
        torch.tensor(model.reduction(step), dtype=torch.float64),
        residual.tensor.square().sum() / 2 - lowered,
    )


def test_enough_conjugate_gradients_solve_the_damped_equations() -> None:
    factors = [tensor_of((length, 2), seed=length) for length in (3, 4, 5)]
    model = _Linearised(factors, Target(tensor_of((3, 4, 5))).residual(factors))
    step = model.step(0.5, 200)
    rest = model.product(step) + 0.5 * step + model.gradient
    assert rest.norm() < 1e-2 * model.gradient.norm()


@given(st.lists(st.integers(2, 6), min_size=2, max_size=4).map(tuple), st.integers(1, 4), seeds)
def test_every_step_lowers_the_error(shape, rank, seed) -> None:
    target = Target(tensor_of(shape, seed=seed))
    factors = [tensor_of((length, rank), seed=seed + k) for k, length in enumerate(shape)]
    errors = [error(target, gauss_newton(target, factors, steps, 0)) for steps in (0, 1, 3, 10)]
    for before, after in itertools.pairwise(errors):
        assert after <= before + 1e-12


@given(seeds)
def test_it_gets_through_where_alternating_crawls(seed) -> None:
    """Terms with a congruence of 0.95 in every mode: a swamp."""
    truth = collinear_factors(15, 5, 0.95, seed)
    target = Target(multiply_out(truth))
    factors = [tensor_of((15, 5), seed=seed + 50 + mode) for mode in range(3)]
    approached = alternate(target, factors, 10, 0)
    found = gauss_newton(target, approached, 150, 1e-12)  # no further once it is there
    crawling = alternate(target, factors, 300, 0)
    assert error(target, found) < 0.1 * error(target, crawling) or error(target, found) < 1e-8


def test_balancing_changes_norms_and_no_product() -> None:
    factors = [tensor_of((length, 3), seed=length) * length**3 for length in (3, 4, 5)]
    even = balanced(factors)
    torch.testing.assert_close(multiply_out(even), multiply_out(factors))
    for factor in even:
        torch.testing.assert_close(factor.norm(dim=0), even[0].norm(dim=0))
    factors[0][:, 1] = 0
    vanished = balanced(factors)
    assert all(torch.isfinite(factor).all() and not factor[:, 1].any() for factor in vanished)
