import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankfold.ranks import evbmf_rank
from rankfold.ranks.evbmf import _detection_threshold, _free_energy, _noise_variance


def noisy(rows: int, columns: int, rank: int, noise: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
    error = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return left @ right / max(rank, 1) ** 0.5 + noise * error


@given(
    st.sampled_from([(60, 60), (60, 200), (300, 80)]),
    st.integers(0, 8),  # all well above the noise: fainter ones may be missed, rightly
    st.sampled_from([1e-6, 0.01, 0.1, 0.3]),
    st.integers(0, 1000),
)
def test_planted_ranks_are_recovered_over_noise_levels(shape, rank, noise, seed) -> None:
    singular_values = torch.linalg.svdvals(noisy(*shape, rank, noise, seed))
    assert evbmf_rank(singular_values, shape) == rank


def test_known_noise_variance() -> None:
    singular_values = torch.linalg.svdvals(noisy(60, 90, 7, 0.2, 0))
    assert evbmf_rank(singular_values, (60, 90), noise_variance=0.04) == 7
    assert evbmf_rank(singular_values, (60, 90), noise_variance=1e6) == 0


def test_detection_threshold_of_a_square_matrix() -> None:
    """The paper's (1 + tau)(1 + 1 / tau), tau = 2.5129: 4.9108 times side and noise variance."""
    for squared, rank in ((4.910, 0), (4.912, 1)):
        singular_values = torch.tensor([(squared * 3 * 0.25) ** 0.5, 0.1, 0.1], dtype=torch.float64)
        assert evbmf_rank(singular_values, (3, 3), noise_variance=0.25) == rank


@given(st.integers(0, 200), st.floats(1e-3, 10), st.floats(1e-3, 10))
def test_more_noise_leaves_less_signal(seed, first, second) -> None:
    singular_values = torch.linalg.svdvals(noisy(20, 30, 7, 0.2, seed))
    less, more = sorted((first, second))
    assert evbmf_rank(singular_values, (20, 30), more) <= evbmf_rank(
        singular_values, (20, 30), less
    )


@given(st.integers(0, 200), st.floats(0.05, 2))
def test_noise_variance_is_the_global_minimum_of_the_free_energy(seed, noise) -> None:
    rows, columns = 12, 30
    squared = torch.linalg.svdvals(noisy(rows, columns, 3, noise, seed)).square().numpy()
    ratio = rows / columns
    threshold = _detection_threshold(ratio)

    def energy(variance: float) -> float:
        return _free_energy(squared / (columns * variance), ratio, threshold)

    found = energy(_noise_variance(squared, rows, columns))
    upper = squared.sum() / (rows * columns)
    brute_force = min(map(energy, np.geomspace(upper / 30, upper, 5_000)))
    assert found <= brute_force + 1e-6 * abs(brute_force)


@given(st.floats(0.05, 1), st.floats(1.01, 50))
def test_free_energy_of_signal_is_that_of_the_paper(ratio, factor) -> None:
    """Parametrised by tau, of which x = (1 + tau)(1 + ratio / tau) is the closed form."""
    tau = 2.5129 * ratio**0.5 * factor
    x = (1 + tau) * (1 + ratio / tau)
    expected = x - np.log(x) + np.log(tau + 1) + ratio * np.log(tau / ratio + 1) - tau
    found = _free_energy(np.array([x]), ratio, _detection_threshold(ratio))
    assert found == pytest.approx(expected, rel=1e-6)
    noise = np.array([0.5 * (1 + ratio)])
    assert _free_energy(noise, ratio, _detection_threshold(ratio)) == pytest.approx(
        (noise - np.log(noise)).item()
    )


def test_estimated_noise_is_the_noise() -> None:
    squared = torch.linalg.svdvals(noisy(200, 300, 10, 0.3, 0)).square().numpy()
    assert _noise_variance(squared, 200, 300) == pytest.approx(0.09, rel=0.05)


def test_orientation_and_scale_do_not_matter() -> None:
    singular_values = torch.linalg.svdvals(noisy(40, 100, 5, 0.2, 0))
    assert evbmf_rank(singular_values, (40, 100)) == evbmf_rank(singular_values, (100, 40)) == 5
    assert evbmf_rank(1e-6 * singular_values, (40, 100)) == 5


def test_edges() -> None:
    assert evbmf_rank(torch.zeros(4), (4, 9)) == 0
    assert evbmf_rank(torch.ones(1), (1, 1)) in (0, 1)
    with pytest.raises(ValueError, match="has 4 singular values, not 3"):
        evbmf_rank(torch.ones(3), (4, 9))
