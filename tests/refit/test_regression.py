import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankfold.refit.regression import Regression
from rankfold.refit.threshold import Threshold


def known(features: int, responses: int, rank: int, bias: float, seed: int) -> Regression:
    """Responses that are a map of this rank of the features, but for some noise."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, dtype=torch.float64, generator=generator)

    seen = draw(400, features) * torch.linspace(0.5, 2, features).double() + bias
    weight = draw(responses, rank) @ draw(rank, features)
    made = seen @ weight.mT + bias + 0.3 * draw(400, responses)
    return Regression(seen, made, torch.zeros(responses, features).double(), bias != 0)


def squared_error(found, regression: Regression) -> float:
    return (found(regression.features) - regression.responses).square().sum().item()


@given(st.integers(1, 8), st.integers(1, 8), st.sampled_from([0.0, 2.0]), st.integers(0, 99))
def test_of_full_rank_it_is_least_squares_with_a_small_ridge(
    features, responses, bias, seed
) -> None:
    regression = known(features, responses, 2, bias, seed)
    found = regression.solve()
    rows, wanted = regression.features, regression.responses
    if bias:
        rows, wanted = rows - rows.mean(0), wanted - wanted.mean(0)
    tie = (1e-3 * rows.square().mean(0).mean() * len(rows)).sqrt()
    rows = torch.cat([rows, tie * torch.eye(features).double()])
    wanted = torch.cat([wanted, torch.zeros(features, responses).double()])
    best = torch.linalg.lstsq(rows, wanted, driver="gelsd").solution.mT
    torch.testing.assert_close(found.weight, best, rtol=1e-6, atol=1e-8)
    left = found(regression.features) - regression.responses
    if bias:
        torch.testing.assert_close(left.mean(0), torch.zeros_like(left[0]), rtol=0, atol=1e-9)


@given(st.integers(2, 8), st.integers(2, 8), st.sampled_from([0.0, 2.0]), st.integers(0, 99))
def test_of_reduced_rank_none_nearby_is_better(features, responses, bias, seed) -> None:
    regression = known(features, responses, 2, bias, seed)
    found = regression.solve(rank=1)
    left, right = found.factors
    torch.testing.assert_close(left @ right, found.weight)
    assert left.shape == (responses, 1) and right.shape == (1, features)
    least = squared_error(found, regression)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(5):
        moves = [
            0.03 * torch.randn(one.shape, generator=generator).double() * one.abs().mean()
            for one in (left, right)
        ]
        other = (left + moves[0]) @ (right + moves[1])
        predicted = regression.features @ other.mT
        shift = (regression.responses - predicted).mean(0) if bias else 0
        error = (predicted + shift - regression.responses).square().sum().item()
        assert error >= 0.998 * least


def test_rank_to_spare_changes_nothing() -> None:
    regression = known(5, 7, 3, 1.0, 0)
    torch.testing.assert_close(regression.solve(rank=5).weight, regression.solve().weight)


@pytest.mark.parametrize("rank", [None, 2])
def test_features_that_are_never_seen_keep_the_map(rank) -> None:
    regression = known(5, 4, 2, 0.0, 0)
    regression.features[:, 3:] = 0
    regression.weight[:2, 3:] = 1
    found = regression.solve(rank=rank).weight
    if rank is None:
        torch.testing.assert_close(found[:, 3:], regression.weight[:, 3:])
    assert torch.isfinite(found).all()


def test_through_a_relu_what_it_cuts_off_is_free() -> None:
    regression = known(4, 6, 4, 0.5, 1)
    ones = torch.ones(6).double()
    relu = Threshold(ones, 0 * ones)
    hidden = regression.responses < 0
    # Whatever lies below 0 is as good as anything else there.
    spoilt = torch.where(hidden, 20 * regression.responses, regression.responses)
    regression = Regression(regression.features, spoilt, regression.weight, regression.has_bias)

    def error(found) -> float:
        return (relu.of(found(regression.features)) - relu.of(spoilt)).square().sum().item()

    assert error(regression.solve(relu)) < 0.2 * error(regression.solve())
