"""Decompositions in the metric of inputs, beside those by the moment of the inputs itself."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankfold.from_disk import metric
from rankfold.from_disk.metric import InputsMetric
from rankfold.methods import Moments
from rankfold.methods.svd import low_rank_factors


def moments_of(inputs: torch.Tensor) -> Moments:
    rows = inputs.reshape(-1, inputs.shape[-1]).double()
    return Moments(rows.mT @ rows / len(rows)).damped(1e-6)


@given(
    outputs=st.integers(1, 24),
    features=st.integers(1, 24),
    count=st.integers(1, 60),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_all_ways_lead_to_the_same_factors(outputs, features, count, dtype, data) -> None:
    torch.manual_seed(data.draw(st.integers(0, 100)))
    rank = data.draw(st.integers(1, min(outputs, features)))
    weight = torch.randn(outputs, features).to(dtype)
    inputs = torch.randn(count, 2, features).to(dtype)
    left, right, values = InputsMetric().factors(weight, inputs, rank)
    moments = moments_of(inputs)
    theirs = low_rank_factors(weight, moments)
    assert left.shape == (outputs, rank) and right.shape == (rank, features)
    scale = theirs[2].max().item()
    torch.testing.assert_close(values, theirs[2], rtol=0, atol=1e-7 * scale)
    # The error is what the values say, by inputs that are multiplied out.
    difference = weight.double() - left.double() @ right.double()
    expected = values[rank:].square().sum().item()
    assert moments.squared_error(difference) == pytest.approx(
        expected, rel=1e-4, abs=1e-8 * scale**2
    )


def count_moments(monkeypatch) -> list[int]:
    made: list[int] = []
    of_inputs = metric._of_inputs
    monkeypatch.setattr(metric, "_of_inputs", lambda x: made.append(1) or of_inputs(x))
    return made


def test_layers_of_the_same_inputs_share_their_moment(monkeypatch) -> None:
    made, found = count_moments(monkeypatch), InputsMetric()
    inputs, weights = torch.randn(40, 12), torch.randn(3, 16, 12)
    alone = [low_rank_factors(weight, moments_of(inputs), 4) for weight in weights]
    for weight, expected in zip(weights, alone, strict=True):
        for ours, theirs in zip(found.factors(weight, inputs, 4), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert len(made) == 1
    found.factors(weights[0], inputs.clone(), 4)
    assert len(made) == 2


def test_inputs_that_are_changed_are_other_inputs(monkeypatch) -> None:
    made, found = count_moments(monkeypatch), InputsMetric()
    inputs, weight = torch.randn(40, 12), torch.randn(16, 12)
    found.factors(weight, inputs, 4)
    inputs[:, 0] *= 100
    values = found.factors(weight, inputs, 4)[2]
    assert len(made) == 2
    torch.testing.assert_close(values, low_rank_factors(weight, moments_of(inputs))[2])
    with torch.inference_mode():
        inputs = torch.randn(40, 12)
        for _ in range(2):
            found.factors(weight, inputs, 4)
            inputs *= 2
    assert len(made) == 4


def test_inputs_are_not_kept_alive() -> None:
    found, inputs, weight = InputsMetric(), torch.randn(40, 12), torch.randn(16, 12)
    found.factors(weight, inputs, 4)
    alive = weakref.ref(inputs)
    del inputs
    assert alive() is None
