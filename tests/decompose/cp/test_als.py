import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st
from tensors import seeds, tensor_of

from rankfold.decompose.cp.als import alternate, unit_columns
from rankfold.decompose.cp.form import khatri_rao, multiply_out
from rankfold.decompose.cp.target import Target
from rankfold.decompose.unfolding import unfold


def error(target: Target, factors: list[torch.Tensor]) -> float:
    return (target.residual(factors).squared_norm / target.squared_norm) ** 0.5


@given(st.lists(st.integers(2, 6), min_size=2, max_size=4).map(tuple), st.integers(1, 4), seeds)
def test_every_sweep_lowers_the_error(shape, rank, seed) -> None:
    target = Target(tensor_of(shape, seed=seed))
    factors = [tensor_of((length, rank), seed=seed + k) for k, length in enumerate(shape)]
    errors = [error(target, alternate(target, factors, sweeps, 0)) for sweeps in (1, 2, 5, 20)]
    for before, after in itertools.pairwise(errors):
        assert after <= before + 1e-7


def test_one_sweep_is_a_least_squares_problem_per_mode() -> None:
    tensor = tensor_of((4, 5, 6))
    factors = [unit_columns(tensor_of((length, 2), seed=length)) for length in (4, 5, 6)]
    expected = list(factors)
    for mode in range(3):
        others = khatri_rao([factor for k, factor in enumerate(expected) if k != mode])
        expected[mode] = torch.linalg.lstsq(others, unfold(tensor, mode).mT).solution.mT
        last = expected[mode]
        expected[mode] = unit_columns(last)
    found = alternate(Target(tensor), factors, 1, 0)
    torch.testing.assert_close(multiply_out(found), multiply_out([*expected[:-1], last]))


def test_it_stops_when_little_is_gained() -> None:
    target = Target(tensor_of((4, 5, 6)))
    factors = [tensor_of((length, 2), seed=length) for length in (4, 5, 6)]
    early = error(target, alternate(target, factors, 1000, 0.5))
    late = error(target, alternate(target, factors, 1000, 1e-9))
    assert late < early
    assert multiply_out(alternate(target, factors, 0, 0)).shape == (4, 5, 6)
