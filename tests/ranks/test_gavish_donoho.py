import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankfold.ranks import gavish_donoho_rank
from rankfold.ranks.gavish_donoho import _median_of_noise, _threshold


def noisy(shape: tuple[int, int], rank: int, noise: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(shape[0], rank, generator=generator, dtype=torch.float64)
    right = torch.randn(rank, shape[1], generator=generator, dtype=torch.float64)
    error = torch.randn(shape, generator=generator, dtype=torch.float64)
    return left @ right + noise * error


@given(
    st.sampled_from([(60, 60), (60, 200), (300, 80)]),
    st.integers(0, 8),
    st.sampled_from([0.01, 0.1, 0.3]),
    st.integers(0, 1000),
)
def test_planted_ranks_are_recovered(shape, rank, noise, seed) -> None:
    singular_values = torch.linalg.svdvals(noisy(shape, rank, noise, seed))
    assert gavish_donoho_rank(singular_values, shape) == rank
    assert gavish_donoho_rank(singular_values, shape, noise) == rank


def test_thresholds_are_the_papers() -> None:
    assert _threshold(1) == pytest.approx(4 / math.sqrt(3))
    # The paper's table of ω(β) = λ*(β) / √μ_β.
    for ratio, omega in ((1.0, 2.858), (0.5, 2.1711), (0.1, 1.6089)):
        assert _threshold(ratio) / math.sqrt(_median_of_noise(ratio)) == pytest.approx(
            omega, abs=2e-3
        )


def test_median_is_that_of_noise() -> None:
    noise = noisy((400, 1000), 0, 1.0, 0)
    median = torch.linalg.svdvals(noise).square().median().item() / 1000
    assert _median_of_noise(0.4) == pytest.approx(median, rel=0.01)


def test_wrong_number_of_singular_values() -> None:
    with pytest.raises(ValueError, match="has 4 singular values, not 3"):
        gavish_donoho_rank(torch.ones(3), (4, 9))
