import pytest
import torch
from geometry import relative
from hypothesis import given
from hypothesis import strategies as st
from tensors import seeds, tensor_of, weight_of
from torch import nn

from rankfold.errors import TensorError
from rankfold.methods import WEIGHT_METRIC, LowRank, Moments, reduction

sizes = st.integers(1, 5)
kernels = st.lists(st.integers(1, 3), max_size=3).map(tuple)
CPU = torch.device("cpu")


def of_patches(channel_moment: torch.Tensor, places: int) -> torch.Tensor:
    """A moment of patches whose places are uncorrelated and alike."""
    return torch.kron(channel_moment, torch.eye(places, dtype=torch.float64))


def trace_error(difference, inputs, gradients) -> float:
    """tr(G Δ A Δᵀ) as it is written; A of patches."""
    flat = difference.double().flatten(1)
    return torch.trace(gradients @ flat @ inputs @ flat.mT).item()


@given(sizes, sizes, kernels, seeds, st.booleans(), st.sampled_from(["patch", "channel", None]))
def test_squared_error_is_the_trace(outputs, channels, kernel, seed, has_gradients, kind) -> None:
    difference = tensor_of((outputs, channels, *kernel), seed=seed)
    places = difference[0, 0].numel()
    gradients = weight_of(outputs, seed=seed + 1) if has_gradients else None
    inputs = patches = None
    if kind == "channel":
        inputs = weight_of(channels, seed=seed + 2)
        patches = of_patches(inputs, places)
    elif kind == "patch":
        inputs = patches = weight_of(channels * places, seed=seed + 2)
    found = Moments(inputs, gradients).squared_error(difference)
    identities = (torch.eye(n, dtype=torch.float64) for n in (channels * places, outputs))
    plain = [i if m is None else m for i, m in zip(identities, (patches, gradients), strict=True)]
    assert found == pytest.approx(trace_error(difference, *plain), rel=1e-10)


@given(sizes, sizes, kernels, seeds)
def test_products_are_those_of_the_unfolded_weight(outputs, channels, kernel, seed) -> None:
    weight = tensor_of((outputs, channels, *kernel), torch.float32, seed)
    flat = weight.double().flatten(1)
    by_channel = weight_of(channels, seed=seed + 1)
    gradients = weight_of(outputs, seed=seed + 2)
    moments = Moments(by_channel, gradients)
    expected = flat @ of_patches(by_channel, weight[0, 0].numel())
    assert relative(moments.times_inputs(weight), expected) < 1e-12
    assert relative(moments.times_gradients(weight), gradients @ flat) < 1e-12
    assert torch.equal(WEIGHT_METRIC.times_inputs(weight), flat)
    assert torch.equal(WEIGHT_METRIC.times_gradients(weight), flat)


@given(sizes, kernels, seeds)
def test_moment_of_the_channels_is_the_mean_over_a_kernels_places(channels, kernel, seed) -> None:
    places = torch.Size(kernel).numel()
    patches = weight_of(channels * places, seed=seed)
    gradients = weight_of(3, seed=seed + 1)
    found = Moments(patches, gradients, 7.0).of_channels(channels)
    by_place = patches.reshape(channels, places, channels, places)
    mean = sum(by_place[:, place, :, place] for place in range(places)) / places
    torch.testing.assert_close(found.inputs, mean)
    assert found.gradients is gradients and found.scale == 7


def test_moments_of_channels_have_no_other_places_to_average() -> None:
    for moments in (Moments(weight_of(4)), Moments(gradients=weight_of(4)), WEIGHT_METRIC):
        assert moments.of_channels(4) is moments
    by_channel = weight_of(4)
    again = Moments(of_patches(by_channel, 9)).of_channels(4).inputs
    torch.testing.assert_close(again, by_channel)


@given(seeds)
def test_the_loss_of_the_whole_weight_is_1_where_no_scale_is_given(seed) -> None:
    weight = tensor_of((4, 3, 2), seed=seed)
    moments = Moments(weight_of(6, seed=seed), weight_of(4, seed=seed + 1))
    whole = moments.squared_error(weight)
    assert moments.loss_of(whole, weight).item() == pytest.approx(1)
    halved = moments.loss_of(moments.squared_error(weight / 2), weight)
    assert halved.item() == pytest.approx(1 / 4)
    assert WEIGHT_METRIC.loss_of(weight.square().sum(), weight).item() == pytest.approx(1)


def test_a_scale_is_the_loss_per_unit_of_error() -> None:
    moments = Moments(weight_of(6), weight_of(4), scale=2.5)
    errors = torch.tensor([[0.0, 1.0], [3.0, 10.0]])
    losses = moments.loss_of(errors, torch.ones(4, 3, 2))
    assert losses.dtype == torch.float64 and losses.device == CPU
    torch.testing.assert_close(losses, 2.5 * errors.double())


def test_no_loss_is_negative_and_weights_of_no_size_lose_nothing() -> None:
    """Rounding makes errors that are a little below zero."""
    weight = tensor_of((4, 6))
    assert Moments(scale=2.0).loss_of(-1e-15, weight).item() == 0
    assert WEIGHT_METRIC.loss_of(torch.tensor([-1e-15, 0.0]), weight).tolist() == [0, 0]
    assert WEIGHT_METRIC.loss_of(0.0, torch.zeros(4, 6)).item() == 0
    unseen = Moments(torch.zeros(6, 6, dtype=torch.float64))
    assert unseen.loss_of(0.0, weight).item() == 0


def test_to_a_device_and_back() -> None:
    moments = Moments(weight_of(6), weight_of(4), 3.0)
    there = moments.to(torch.device("meta"))
    assert there.inputs.is_meta and there.gradients.is_meta and there.scale == 3
    assert there.inputs.shape == (6, 6) and there.gradients.shape == (4, 4)
    here = moments.to(CPU)
    assert torch.equal(here.inputs, moments.inputs)
    assert torch.equal(here.gradients, moments.gradients)
    for part in (Moments(weight_of(6)), Moments(gradients=weight_of(4)), WEIGHT_METRIC):
        moved = part.to(torch.device("meta"))
        assert (moved.inputs is None) == (part.inputs is None)
        assert (moved.gradients is None) == (part.gradients is None)
        assert moved.scale is None


def test_only_without_moments_all_errors_count_the_same() -> None:
    assert WEIGHT_METRIC.is_plain and Moments(scale=2.0).is_plain
    assert not Moments(weight_of(2)).is_plain
    assert not Moments(gradients=weight_of(2)).is_plain


@given(st.integers(1, 8), seeds)
def test_roots_multiply_to_the_moment_and_to_the_identity(size, seed) -> None:
    inputs, gradients = weight_of(size, seed=seed), weight_of(size + 1, seed=seed + 1)
    moments = Moments(inputs, gradients)
    pairs = (moments.input_roots, inputs), (moments.output_roots, gradients)
    for (root, inverse), moment in pairs:
        assert relative(root @ root, moment) < 1e-10
        assert relative(root @ inverse, torch.eye(len(moment), dtype=torch.float64)) < 1e-8


def test_what_is_no_moment_has_no_roots() -> None:
    assert WEIGHT_METRIC.input_roots is None and WEIGHT_METRIC.output_roots is None
    assert Moments(weight_of(3)).output_roots is None
    assert Moments(gradients=weight_of(3)).input_roots is None


@given(st.integers(2, 8), seeds)
def test_singular_moments_have_finite_inverse_roots(size, seed) -> None:
    moments = Moments(weight_of(size, seed=seed, rank=1), torch.zeros(size, size).double())
    root, inverse = moments.input_roots
    assert torch.isfinite(inverse).all()
    assert relative(root @ root, moments.inputs) < 1e-9
    identity = torch.eye(size, dtype=torch.float64)
    assert relative(root @ inverse, identity) < 1e-8
    for root in moments.output_roots:
        torch.testing.assert_close(root, identity)


def test_nan_in_any_moment_is_refused() -> None:
    fine, broken = torch.eye(4).double(), torch.full((4, 4), torch.nan).double()
    Moments(fine, None, 1.0, Moments(fine)).check_finite()
    for moments in (Moments(broken), Moments(fine, broken), Moments(given=Moments(broken))):
        with pytest.raises(TensorError, match="NaN or infinity"):
            moments.check_finite()
    with pytest.raises(TensorError, match="NaN or infinity"):
        reduction.fit(LowRank(), nn.Linear(4, 4), Moments(broken))


def test_a_loss_that_is_not_finite_is_refused() -> None:
    weight = torch.ones(4, 4, dtype=torch.float16)
    for error in (float("inf"), float("nan"), torch.tensor([0.0, torch.inf])):
        with pytest.raises(TensorError, match=r"beyond what torch.float16 can hold"):
            Moments().loss_of(error, weight)


@pytest.mark.parametrize("lacking", [0, 1, 5])
def test_the_factor_of_the_inputs_has_an_inverse(lacking: int) -> None:
    torch.manual_seed(0)
    samples = torch.randn(12 - lacking, 12, dtype=torch.float64)
    moment = samples.mT @ samples
    factor, inverse = Moments(moment).input_factor
    # Of a singular moment the least eigenvalues are raised to 1e-10 of the greatest.
    torch.testing.assert_close(factor @ factor.mT, moment, rtol=0, atol=2e-10 * moment.norm())
    torch.testing.assert_close(factor @ inverse, torch.eye(12).double(), rtol=0, atol=1e-9)
    assert (factor.triu(1).abs().max() < 1e-12) == (lacking == 0)  # Cholesky's, or the root
    assert Moments().input_factor is None
    diagonal = torch.rand(12, dtype=torch.float64)
    root, _ = Moments(diagonal).input_factor
    torch.testing.assert_close(root @ root, diagonal.diag())
