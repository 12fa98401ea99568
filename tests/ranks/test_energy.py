import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankfold.ranks import energy_rank, tolerance_rank

spectra = st.lists(st.floats(0.01, 100), min_size=1, max_size=30).map(
    lambda values: torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
)


@given(spectra, st.floats(0.01, 1))
def test_it_is_the_least_rank_that_keeps_the_energy(spectrum, kept) -> None:
    rank = energy_rank(spectrum, kept)
    energy = spectrum.square()
    assert energy[:rank].sum() >= (kept - 1e-12) * energy.sum()
    assert rank == 1 or energy[: rank - 1].sum() < (kept + 1e-12) * energy.sum()


@given(spectra, st.floats(0.01, 0.99))
def test_it_is_the_least_rank_within_the_tolerance(spectrum, tolerance) -> None:
    rank = tolerance_rank(spectrum, tolerance)
    assert spectrum[rank:].norm() <= (tolerance + 1e-7) * spectrum.norm()
    assert rank == 1 or spectrum[rank - 1 :].norm() > (tolerance - 1e-7) * spectrum.norm()


def test_a_tolerance_of_zero_keeps_all_that_is_not_zero() -> None:
    assert tolerance_rank(torch.tensor([1.0, 1e-9, 0.0]), 0) == 2
    for tolerance in (-0.1, 1, float("nan")):
        with pytest.raises(ValueError, match="tolerance"):
            tolerance_rank(torch.ones(3), tolerance)


def test_edges() -> None:
    assert energy_rank(torch.zeros(4), 0.9) == 1
    assert energy_rank(torch.tensor([1.0, 0.0, 0.0]), 1.0) == 1
    assert energy_rank(torch.ones(10), 1.0) == 10
    assert energy_rank(torch.ones(10), 0.5) == 5


@pytest.mark.parametrize("kept", [0, -1, 1.1, float("nan")])
def test_senseless_shares_are_refused(kept) -> None:
    with pytest.raises(ValueError, match="energy kept"):
        energy_rank(torch.ones(3), kept)
