import pytest
import torch
from geometry import relative
from hypothesis import given
from hypothesis import strategies as st
from tensors import seeds, tensor_of, weight_of

from rankfold.analysis import METRICS
from rankfold.analysis.metrics import DAMPING, check_metric, competing, moments_of
from rankfold.analysis.statistics import Statistics
from rankfold.errors import CalibrationError, RankfoldError
from rankfold.methods import WEIGHT_METRIC


def statistics_of(inputs=None, gradients=None, positions: float = 9.0) -> Statistics:
    if inputs is None:
        inputs = weight_of(6, seed=1)
    if gradients is None:
        gradients = {"softmax": weight_of(4, seed=2), "identity": weight_of(4, seed=3)}
    magnitudes = inputs.diagonal().sqrt() / 2
    return Statistics(inputs, magnitudes, gradients, positions)


NO_GRADIENTS = statistics_of(gradients={})
BY_NAME = ["weight", "response", "fisher", "fisher:identity", "svd-llm", "asvd", "fwsvd"]


def test_every_metric_there_is_is_known_and_no_other() -> None:
    for metric in (*METRICS, *BY_NAME, "auto", "response:softmax@4"):
        check_metric(metric)
    for metric in ("taste", "", "Fisher", "auto:softmax", "fish:er"):
        with pytest.raises(RankfoldError, match=r"no metric.*auto.*fisher"):
            check_metric(metric)
    assert {name.partition(":")[0] for name in BY_NAME} == set(METRICS)


def test_fisher_has_both_moments_and_half_the_positions() -> None:
    known = statistics_of()
    for metric, curvature in {"fisher": "softmax", "fisher:identity": "identity"}.items():
        found = moments_of(metric, known)
        assert relative(found.inputs, known.inputs) < 1e-5
        gradients = known.gradients[curvature]
        damped = gradients + DAMPING * gradients.trace() / 4 * torch.eye(4)
        torch.testing.assert_close(found.gradients, damped)
        assert found.scale == 9 / 2


def test_response_is_fisher_with_the_mean_of_its_gradients() -> None:
    """What W ↦ ½ T tr(G W A Wᵀ) is for a G that is its mean times the identity."""
    known = statistics_of()
    found = moments_of("response", known)
    assert found.gradients is None and relative(found.inputs, known.inputs) < 1e-5
    assert found.scale == pytest.approx(4.5 * known.gradients["softmax"].trace().item() / 4)
    identity = torch.eye(4, dtype=torch.float64)
    known = statistics_of(gradients={"one": 0.3 * identity})
    error = tensor_of((4, 6), seed=4)
    losses = [
        moments.loss_of(moments.squared_error(error), error).item()
        for moments in (moments_of("response", known), moments_of("fisher", known, damping=0.0))
    ]
    assert losses[0] == pytest.approx(losses[1])


def test_weight_is_response_with_the_mean_of_its_inputs() -> None:
    known = statistics_of(inputs=0.7 * torch.eye(6, dtype=torch.float64))
    plain = moments_of("weight", known)
    assert plain.is_plain
    error = tensor_of((4, 6), seed=4)
    response = moments_of("response", known)
    expected = response.loss_of(response.squared_error(error), error).item()
    assert plain.loss_of(plain.squared_error(error), error).item() == pytest.approx(expected)


def test_svd_llm_is_the_response_of_each_layer_relative_to_its_own() -> None:
    known = statistics_of()
    found = moments_of("svd-llm", known)
    assert found.gradients is None and found.scale is None
    assert relative(found.inputs, known.inputs) < 1e-5


def test_asvd_scales_inputs_by_the_root_of_their_mean_magnitude() -> None:
    known = statistics_of()
    found = moments_of("asvd", known)
    error = tensor_of((4, 6), seed=4)
    scaled = error * known.magnitudes.sqrt()  # Yuan et al. 2023, alpha = ½
    assert found.squared_error(error) == pytest.approx(scaled.square().sum().item())
    assert found.gradients is None and found.scale is None


def test_fwsvd_weighs_rows_by_their_fisher_information() -> None:
    known = statistics_of()
    found = moments_of("fwsvd", known)
    assert found.inputs is None and found.scale is None
    expected = known.gradients["softmax"].diagonal().diag()
    assert relative(found.gradients, expected) < 1e-5


def test_curvatures_that_were_not_gathered_are_refused() -> None:
    for metric in ("fisher:softmax@9", "response:softmax@9", "weight:x", "fwsvd:x"):
        with pytest.raises(CalibrationError, match=r"no curvature .*softmax, identity"):
            moments_of(metric, statistics_of())


@pytest.mark.parametrize("metric", BY_NAME)
def test_a_layer_that_nothing_is_known_of_has_the_weight_metric(metric) -> None:
    assert moments_of(metric, None) is WEIGHT_METRIC


@pytest.mark.parametrize("metric", BY_NAME)
def test_a_layer_without_gradients_has_what_its_inputs_say(metric) -> None:
    found = moments_of(metric, NO_GRADIENTS)
    assert found.gradients is None
    assert (found.inputs is None) == (metric in ("weight", "fwsvd"))
    if metric in ("response", "fisher", "fisher:identity", "svd-llm"):
        assert relative(found.inputs, NO_GRADIENTS.inputs) < 1e-5


@pytest.mark.parametrize("damping", [0.0, 0.05, 1.0])
def test_damping_adds_a_share_of_the_mean_eigenvalue(damping) -> None:
    singular = weight_of(4, seed=5, rank=1)
    known = statistics_of(gradients={"one": singular})
    values = torch.linalg.eigvalsh(moments_of("fisher", known, damping).gradients)
    mean = singular.trace().item() / 4
    assert values[0].item() == pytest.approx(damping * mean, abs=1e-9)
    assert values[-1].item() == pytest.approx((4 + damping) * mean)


@given(st.sampled_from(BY_NAME), seeds, st.booleans(), st.booleans())
def test_moments_that_are_zero_or_singular_are_finite(
    metric, seed, no_inputs, no_gradients
) -> None:
    inputs = weight_of(6, seed=seed, rank=2)
    gradients = weight_of(4, seed=seed + 1, rank=1)
    known = statistics_of(
        inputs * (not no_inputs), {"one": gradients * (not no_gradients)}, positions=4
    )
    metric = metric.partition(":")[0]
    found = moments_of(metric, known)
    error = tensor_of((4, 6), seed=seed)
    loss = found.loss_of(found.squared_error(error), error).item()
    assert 0 <= loss < float("inf")
    for moment in (found.inputs, found.gradients):
        if moment is not None and metric != "asvd":
            assert torch.linalg.eigvalsh(moment)[0] > 0


def test_inputs_of_the_channels_alone_stay_so() -> None:
    known = statistics_of(inputs=weight_of(3, seed=1))
    error = tensor_of((4, 3, 5), seed=2)
    for metric in BY_NAME:
        found = moments_of(metric, known)
        assert found.inputs is None or found.inputs.shape == (3, 3)
        assert found.squared_error(error) > 0


def test_what_competes_are_all_curvatures_and_one_response() -> None:
    assert competing(["softmax", "softmax@4", "identity"]) == [
        "fisher:softmax",
        "fisher:softmax@4",
        "fisher:identity",
        "response:softmax",
    ]
    assert competing([]) == ["response"]
    for metric in competing(["softmax", "identity"]):
        check_metric(metric)
        moments_of(metric, statistics_of())
