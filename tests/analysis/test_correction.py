import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankfold.analysis.candidates import Candidate
from rankfold.analysis.correction import (
    SHARES,
    Check,
    agreement,
    corrected,
    points_to_check,
    spread,
    typical_factor,
)

losses = st.floats(1e-9, 1e3)
costs = st.integers(1, 1000)
drawn_candidates = st.lists(
    st.builds(
        Candidate, st.sampled_from(["a", "b"]), st.tuples(st.integers(1, 9)), losses, costs, costs
    ),
    min_size=1,
    max_size=12,
)


def line(*values: float) -> list[Candidate]:
    """Candidates with these losses; more loss for fewer MACs."""
    ordered = sorted(values, reverse=True)
    return [
        Candidate("svd", (rank,), loss, 10 * rank, 100 * rank)
        for rank, loss in enumerate(ordered, 1)
    ]


def check_of(candidate: Candidate, measured: float) -> Check:
    return Check("layer", candidate.method, candidate.rank, candidate.loss, measured)


@given(drawn_candidates, st.integers(1, 2000))
def test_points_to_check_are_best_for_their_macs_and_near_the_shares(candidates, macs) -> None:
    found = points_to_check(candidates, macs)
    assert 1 <= len(found) <= len(SHARES)
    best = [
        one
        for one in candidates
        if not any(
            other.loss <= one.loss
            and other.macs <= one.macs
            and (other.loss, other.macs) != (one.loss, one.macs)
            for other in candidates
        )
    ]
    assert all(one in best for one in found)
    for share in SHARES:
        nearest = min(abs(one.macs - share * macs) for one in best)
        assert any(abs(one.macs - share * macs) == nearest for one in found)


def test_points_to_check_without_candidates_or_with_one() -> None:
    assert points_to_check([], 100) == []
    (only,) = line(0.5)
    assert points_to_check([only], 1000) == [only]


def test_points_to_check_of_a_line() -> None:
    candidates = line(0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005)
    assert [one.rank for one in points_to_check(candidates, 1000)] == [(5,), (2,)]


@given(
    st.lists(losses, min_size=2, max_size=8, unique=True),
    st.lists(losses, min_size=2, max_size=2, unique=True).map(sorted),
    st.data(),
)
def test_losses_of_what_was_checked_are_those_measured(predicted, measured, data) -> None:
    candidates = line(*predicted)
    chosen = data.draw(st.lists(st.sampled_from(candidates), min_size=2, max_size=2, unique=True))
    chosen.sort(key=lambda one: one.loss)
    checks = [check_of(one, value) for one, value in zip(chosen, measured, strict=True)]
    found = dict(zip(candidates, corrected(candidates, checks), strict=True))
    for one, value in zip(chosen, measured, strict=True):
        assert found[one].loss == pytest.approx(value, rel=1e-6)


@given(
    st.lists(st.one_of(losses, st.just(0.0)), min_size=1, max_size=10),
    st.lists(
        st.tuples(
            st.one_of(losses, st.sampled_from([0.0, 0.1, 1.0])),
            st.one_of(losses, st.sampled_from([0.0, math.inf, math.nan])),
        ),
        max_size=4,
    ),
)
def test_no_correction_turns_the_order_of_two_round(predicted, points) -> None:
    candidates = line(*predicted)
    checks = [Check("layer", "svd", (1,), *point) for point in points]
    found = corrected(candidates, checks)
    assert [replace(one, loss=0.0) for one in found] == [
        replace(one, loss=0.0) for one in candidates
    ]
    for first, second in pairwise(found):
        assert first.loss >= second.loss
    for before, after in zip(candidates, found, strict=True):
        assert math.isfinite(after.loss) and (after.loss == 0) == (before.loss == 0)


def test_beyond_what_was_checked_the_nearest_factor_is_kept() -> None:
    candidates = line(1.0, 0.1, 0.01, 0.001)
    checks = [check_of(candidates[1], 0.2), check_of(candidates[2], 0.05)]
    found = [one.loss for one in corrected(candidates, checks)]
    assert found == pytest.approx([2.0, 0.2, 0.05, 0.005])
    alone = [one.loss for one in corrected(candidates, checks[:1])]
    assert alone == pytest.approx([2.0, 0.2, 0.02, 0.002])


def test_between_two_checks_the_logarithm_is_interpolated() -> None:
    candidates = line(1.0, 0.1, 0.01)
    checks = [check_of(candidates[0], 4.0), check_of(candidates[2], 0.01)]
    assert corrected(candidates, checks)[1].loss == pytest.approx(0.2)  # √(4 · 0.01)


def test_measurements_that_turn_the_order_round_are_levelled() -> None:
    candidates = line(1.0, 0.1)
    checks = [check_of(candidates[0], 0.2), check_of(candidates[1], 0.3)]
    assert [one.loss for one in corrected(candidates, checks)] == pytest.approx([0.3, 0.3])


def test_without_a_finite_measurement_nothing_is_corrected() -> None:
    candidates = line(1.0, 0.1)
    assert corrected(candidates, []) == candidates
    for bad in (math.inf, math.nan):
        assert corrected(candidates, [check_of(candidates[0], bad)]) == candidates
    assert corrected([], [Check("layer", "svd", (1,), 0.1, 0.2)]) == []


def test_agreement_is_one_for_the_same_order_and_minus_one_for_its_opposite() -> None:
    def checks(*pairs: tuple[float, float]) -> list[Check]:
        return [Check("layer", "svd", (1,), *pair) for pair in pairs]

    assert agreement(checks((1, 10), (2, 11), (3, 50), (4, math.inf))) == pytest.approx(1)
    assert agreement(checks((1, 5), (2, 4), (3, 3))) == pytest.approx(-1)
    # Of three, one exchange of neighbours: 1 - 6 · 2 / (3 · 8).
    assert agreement(checks((1, 1), (2, 3), (3, 2))) == pytest.approx(0.5)
    assert math.isnan(agreement(checks((1, 1), (2, 2)))) and math.isnan(agreement([]))


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(0, 60))
def test_points_are_left_out_evenly(counts, most) -> None:
    points = [line(*(0.1 * (1 + at) for at in range(count))) for count in counts]
    found = spread(points, most)
    assert sum(map(len, found)) == min(most, sum(counts))
    for kept, all_of_it in zip(found, points, strict=True):
        assert [one for one in all_of_it if one in kept] == kept
    if set(counts) == {2} and most >= len(counts):
        assert all(found)


def test_a_layer_without_checks_is_corrected_by_the_typical_factor() -> None:
    candidates = line(0.4, 0.2)
    checks = [check_of(line(1.0)[0], measured) for measured in (2.0, 3.0, 50.0, math.inf)]
    assert typical_factor(checks) == pytest.approx(3)
    assert typical_factor([]) == 1
    found = corrected(candidates, [], typical_factor(checks))
    assert [one.loss for one in found] == pytest.approx([1.2, 0.6])
