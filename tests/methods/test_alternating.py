from itertools import pairwise

import pytest
import torch
from tensors import tensor_of, weight_of

from rankfold.methods import WEIGHT_METRIC, Moments
from rankfold.methods.alternating import improve, lowered


def metric_of(length: int) -> torch.Tensor:
    return weight_of(length, seed=length) + torch.eye(length)


@pytest.mark.parametrize(
    "moments",
    [WEIGHT_METRIC, Moments(metric_of(6)), Moments(metric_of(3), metric_of(4))],
    ids=["weight", "patches", "channels"],
)
def test_enough_steps_solve_the_normal_equations_and_each_lowers_the_error(moments) -> None:
    weight, row = tensor_of((4, 3, 2)), tensor_of((2,), seed=1)
    start = tensor_of((4, 3), seed=2)

    def product(factor: torch.Tensor) -> torch.Tensor:
        return factor[..., None] * row

    def error(factor: torch.Tensor) -> float:
        return moments.squared_error(product(factor) - weight)

    errors = [
        error(improve(start, product, weight, moments, lambda r: r, steps)) for steps in range(40)
    ]
    assert errors[0] == error(start)
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(errors))
    assert errors[3] < errors[0]
    # By brute force: the product as a matrix, the metric as another.
    effects = [product(unit.reshape(start.shape)).double() for unit in torch.eye(start.numel())]
    weighed = [moments.times_gradients(moments.times_inputs(effect)) for effect in effects]
    gram = torch.tensor([[(e.flatten(1) * w).sum() for e in effects] for w in weighed])
    crossed = torch.stack([(weight.flatten(1) * w).sum() for w in weighed])
    solved = torch.linalg.solve(gram, crossed).reshape(start.shape)
    assert errors[-1] == pytest.approx(error(solved), rel=1e-6)


def test_a_factor_that_is_best_stays_as_it_is() -> None:
    factor = tensor_of((4, 3))
    improved = improve(factor, lambda given: given, factor, Moments(weight_of(3)), lambda r: r)
    assert torch.equal(improved, factor)


def test_sweeps_go_on_for_as_long_as_the_error_falls() -> None:
    errors = [5.0, 3.0, 2.0, 2.0, 1.0]
    assert lowered(0, lambda k: k + 1, lambda k: errors[k], whole=10.0, sweeps=4) == 2
    assert lowered(0, lambda k: k + 1, lambda k: errors[k], whole=10.0, sweeps=1) == 1
    assert lowered(0, lambda k: k + 1, lambda k: errors[k], whole=1e21) == 0  # exact already
