import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankfold.distances import Cosine, Divergence, SquaredError, Transcription
from rankfold.errors import ModelError, RankfoldError

DISTANCES = [SquaredError(), Divergence(), Divergence(4.0), Cosine()]
shapes = st.sampled_from([(3, 5), (2, 4, 5), (2, 5, 3, 4)])


def random(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("distance", DISTANCES, ids=str)
@given(shape=shapes, seed=st.integers(0, 100))
def test_equal_outputs_are_at_no_distance_and_others_at_some(distance, shape, seed) -> None:
    target, output = random(shape, seed), random(shape, seed + 1)
    assert distance(target, target).item() == pytest.approx(0, abs=1e-6)
    assert distance(output, target).item() > 1e-3
    assert distance((output, target), (target, target)).item() == pytest.approx(
        distance(output, target).item() / 2, rel=1e-5, abs=1e-6
    )


@pytest.mark.parametrize("distance", DISTANCES, ids=str)
def test_outputs_that_cannot_be_compared_are_refused(distance) -> None:
    for output, target in ((torch.zeros(2, 2), torch.zeros(3, 2)), ([], []), ("text", "text")):
        with pytest.raises(ModelError, match="same shapes"):
            distance(output, target)


def test_the_squared_error_is_relative_to_the_targets_variance() -> None:
    target = torch.tensor([1.0, 3.0])
    assert SquaredError()(target + 2, target).item() == pytest.approx(4.0)
    assert SquaredError()(1000 * (target + 2), 1000 * target).item() == pytest.approx(4.0)


@given(st.integers(0, 100), st.sampled_from([0.5, 1.0, 3.0]))
def test_the_divergence_is_that_of_the_distributions(seed, temperature) -> None:
    output, target = random((4, 6), seed), random((4, 6), seed + 1)
    found, expected = (
        torch.distributions.Categorical(logits=logits / temperature) for logits in (output, target)
    )
    mean = torch.distributions.kl_divergence(expected, found).mean().item()
    assert Divergence(temperature)(output, target).item() == pytest.approx(
        temperature**2 * mean, rel=1e-5
    )


def test_at_high_temperature_the_divergence_is_the_squared_error_of_centred_logits() -> None:
    output, target = random((4, 6), 0), random((4, 6), 1)
    difference = output - target
    centred = difference - difference.mean(-1, keepdim=True)
    found = Divergence(1000.0)(output, target).item()
    assert found == pytest.approx(centred.square().mean().item() / 2, rel=1e-2)


def test_classes_of_pictures_are_the_second_mode_and_ruled_out_ones_do_not_count() -> None:
    output, target = random((2, 5, 3, 4), 0), random((2, 5, 3, 4), 1)
    last = Divergence()(output.movedim(1, -1).flatten(0, 2), target.movedim(1, -1).flatten(0, 2))
    assert Divergence()(output, target).item() == pytest.approx(last.item())
    ruled_out = target.clone()
    ruled_out[:, 0] = -math.inf
    found = Divergence()(output.requires_grad_(), ruled_out)
    found.backward()
    assert torch.isfinite(found) and torch.isfinite(output.grad).all()


def test_a_cosine_sees_angles_alone() -> None:
    target = random((3, 5), 0)
    assert Cosine()(7 * target, target).item() == pytest.approx(0, abs=1e-9)
    assert Cosine()(-target, target).item() == pytest.approx(2)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_that_makes_no_sense_is_refused(temperature) -> None:
    with pytest.raises(RankfoldError, match="temperature"):
        Divergence(temperature)


def sequence(symbols: list[int], classes: int, logit: float = 10.0) -> torch.Tensor:
    """Logits (1, frames, classes) that say these symbols, frame by frame."""
    return logit * torch.nn.functional.one_hot(torch.tensor([symbols]), classes).double()


def test_a_transcription_is_right_however_it_is_aligned() -> None:
    """The loss of what is read alone: `weight` apart, the divergence of frames is subtracted."""

    def excess(output: torch.Tensor, target: torch.Tensor, blank: int = 0) -> float:
        distance = Transcription(blank, weight=1.0)
        return (distance(output, target) - Divergence()(output, target)).item()

    target = sequence([1, 1, 0, 1, 2, 2, 0], 4)  # reads 1 1 2
    for path in ([1, 0, 1, 2, 2, 2, 2], [0, 1, 0, 1, 0, 0, 2]):
        assert excess(sequence(path, 4), target) == pytest.approx(0, abs=1e-2)
    for path in ([1, 1, 1, 1, 2, 2, 0], [1, 0, 1, 3, 3, 0, 0], [0] * 7):
        assert excess(sequence(path, 4), target) > 1
    assert excess(sequence([3, 0, 3, 1, 2, 2, 2], 4), target, blank=3) > 1  # reads 0 1 2 there


def test_a_transcription_is_the_loss_of_the_best_path_summed_over_alignments() -> None:
    """By hand: of three frames and one symbol, all paths that read it."""
    output, target = random((1, 3, 2), 0), sequence([0, 1, 0], 2)
    p = output.softmax(-1)[0]
    paths = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 1, 1)]
    likelihood = sum(p[0, a] * p[1, b] * p[2, c] for a, b, c in paths)
    found = Transcription(weight=2.0)(output, target) - Divergence()(output, target)
    assert found.item() == pytest.approx(-2 * likelihood.log().item(), rel=1e-5)


def test_a_transcription_of_nothing_has_gradients() -> None:
    output = random((2, 4, 3), 0).requires_grad_()
    Transcription()(output, sequence([0, 0, 0, 0], 3).expand(2, -1, -1)).backward()
    assert torch.isfinite(output.grad).all() and output.grad.any()


def test_what_is_no_sequence_with_a_blank_is_refused() -> None:
    for shape, blank in (((2, 5), 0), ((2, 5, 3, 4), 0), ((2, 4, 3), 3)):
        with pytest.raises(ModelError, match="no sequence"):
            Transcription(blank)(torch.zeros(shape), torch.zeros(shape))
    for wrong in ({"blank": -1}, {"weight": -0.1}, {"weight": math.nan}, {"temperature": 0.0}):
        with pytest.raises(RankfoldError):
            Transcription(**wrong)
    with pytest.raises(ModelError, match="same shapes"):
        Transcription()(torch.zeros(2, 4, 3), torch.zeros(2, 5, 3))
