"""The statistics of recurrent layers: moments of their states, and of the gradients at them."""

import pytest
import torch
from recurrent import cell_of, every_cell, every_kind, make, run_cell, sequences
from tensors import tensor_of
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from rankfold.analysis.curvature import Identity, Labels
from rankfold.analysis.metrics import METRICS, moments_of, typical_scale
from rankfold.analysis.statistics import gather
from rankfold.batches import run
from rankfold.errors import CalibrationError
from rankfold.methods import METHODS


class Wrapped(nn.Module):
    """A recurrent layer, and what is read of it."""

    def __init__(self, layer: nn.Module, read=lambda found: found[0]) -> None:
        super().__init__()
        self.rnn, self.read = layer, read

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return self.read(self.rnn(given))


def gathered(model: nn.Module, *batches, curvature=None, **options):
    curvatures = [curvature or Identity()]
    return gather(model, {"rnn": model.rnn}, list(batches), run, curvatures, **options)["rnn"]


@pytest.mark.parametrize(("kind", "settings"), every_kind())
def test_inputs_are_the_states_of_every_layer_and_direction(kind, settings) -> None:
    layer = make(kind, settings)
    given = sequences(layer)[0]
    found = gathered(Wrapped(layer), given)
    directions = 2 if layer.bidirectional else 1
    hidden = layer.hidden_size
    assert found.inputs.shape == (layer.num_layers * directions, hidden, hidden)
    top = layer(given)[0].detach().reshape(-1, directions, hidden)
    for direction in range(directions):
        rows = top[:, direction]
        block = direction - directions
        torch.testing.assert_close(found.inputs[block], rows.mT @ rows / len(rows))
        torch.testing.assert_close(found.magnitudes[block], rows.abs().mean(0))
    # The samples of a batch are along its first mode.
    assert found.positions == 15 / len(given)
    assert found.gradients["identity"].shape == found.inputs.shape
    assert all(block.trace() > 0 for block in found.gradients["identity"])


def test_packed_sequences_count_without_their_padding() -> None:
    layer = make(nn.LSTM, {"bidirectional": True})
    parts = [tensor_of((length, layer.input_size), seed=length) for length in (2, 6, 3)]
    model = Wrapped(layer, lambda found: found[0].data)
    found = gather(
        model,
        {"rnn": layer},
        [pack_sequence(parts, enforce_sorted=False)],
        lambda model, batch: model(batch),
        [Identity()],
    )["rnn"]
    rows = torch.cat([layer(part)[0].detach() for part in parts])[:, : layer.hidden_size]
    torch.testing.assert_close(found.inputs[0], rows.mT @ rows / 11)


def summed(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return (output * label).sum() / len(output)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_gradients_of_the_last_output_reach_all_steps_and_count_by_all(kind) -> None:
    """Of the forward direction all, of the backward one the first step alone."""
    layer = make(kind, {"bidirectional": True, "batch_first": True})
    given = tensor_of((2, 5, layer.input_size), seed=3)
    label = tensor_of((2, 2 * layer.hidden_size), seed=4)
    model = Wrapped(layer, lambda found: found[0][:, -1])
    found = gathered(model, (given, label), curvature=Labels(summed)).gradients["labels"]
    rows = label[:, layer.hidden_size :]
    torch.testing.assert_close(found[1], rows.mT @ rows / 10)
    at_last = label[:, : layer.hidden_size]
    rest = 10 * found[0] - at_last.mT @ at_last
    assert rest.trace() > 1e-6 and torch.linalg.eigvalsh(rest).min() > -1e-9


def test_more_batches_and_probes_are_averaged() -> None:
    layer = make(nn.GRU, {"batch_first": True})
    batches = [tensor_of((3, 4, layer.input_size), seed=s) for s in (1, 2)]
    label = tensor_of((3, 4, layer.hidden_size), seed=3)
    model, curvature = Wrapped(layer), Labels(summed)
    one, other = (gathered(model, (batch, label), curvature=curvature) for batch in batches)
    both = gathered(model, *((batch, label) for batch in batches), curvature=curvature, probes=2)
    torch.testing.assert_close(both.inputs, (one.inputs + other.inputs) / 2)
    mean = (one.gradients["labels"] + other.gradients["labels"]) / 2
    torch.testing.assert_close(both.gradients["labels"], mean)
    assert both.positions == 4


def test_states_that_nothing_reads_have_gradients_of_zero() -> None:
    layer = make(nn.GRU, {"bidirectional": True, "batch_first": True})
    half = layer.hidden_size
    model = Wrapped(layer, lambda found: found[0][..., :half])
    found = gathered(model, tensor_of((2, 3, layer.input_size)))
    assert found.gradients["identity"][1].abs().max() == 0
    moments = moments_of("fisher", found)
    assert torch.linalg.eigvalsh(moments.gradients).min() > 0
    family = METHODS["fewer-units"]().fit(layer, moments)
    assert torch.isfinite(family.build((8,)).states).all()


def test_outputs_that_are_read_without_gradients_have_none() -> None:
    layer = make(nn.LSTM, {"batch_first": True})
    given = tensor_of((2, 3, layer.input_size))
    for context in (torch.no_grad, torch.inference_mode):

        class Guarded(Wrapped):
            def forward(self, given, context=context):
                with context():
                    return super().forward(given).sum(-1)

        found = gathered(Guarded(layer), given)
        assert not found.gradients
        rows = layer(given)[0].detach().flatten(0, 1)
        torch.testing.assert_close(found.inputs[0], rows.mT @ rows / len(rows))


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_serves_recurrent_layers(metric) -> None:
    layer = make(nn.LSTM, {"num_layers": 2, "bidirectional": True})
    found = gathered(Wrapped(layer), sequences(layer)[0])
    moments = moments_of(metric, found, typical=typical_scale(metric, [found]))
    family = METHODS["fewer-units"]().fit(layer, moments)
    losses = [family.loss(rank) for rank in family.ranks()]
    assert losses == sorted(losses, reverse=True) and losses[0] > 0
    for rank in family.ranks():
        assert all(torch.isfinite(p).all() for p in family.build(rank).parameters())


def test_inputs_that_are_not_finite_are_named() -> None:
    layer = make(nn.LSTM, {})
    given = sequences(layer)[0]
    given[0, 0, 0] = torch.nan
    with pytest.raises(CalibrationError, match="layer 'rnn' is given NaN"):
        gathered(Wrapped(layer), given)


@pytest.mark.parametrize(("kind", "of", "settings"), every_cell())
def test_a_cell_run_in_a_loop_has_the_statistics_of_the_layer(kind, of, settings) -> None:
    layer = make(of, settings)
    given, label = tensor_of((5, 3, layer.input_size), seed=3), tensor_of((3, layer.hidden_size))

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = cell_of(kind, layer)

        def forward(self, steps: torch.Tensor) -> torch.Tensor:
            return run_cell(self.rnn, steps)[0][-1]

    ours, theirs = (
        gathered(model, (given, label), curvature=Labels(summed))
        for model in (Loop(), Wrapped(layer, lambda found: found[0][-1]))
    )
    assert ours.positions == theirs.positions
    torch.testing.assert_close(ours.inputs, theirs.inputs)
    torch.testing.assert_close(ours.magnitudes, theirs.magnitudes)
    torch.testing.assert_close(ours.gradients["labels"], theirs.gradients["labels"])
    with torch.inference_mode():
        given = given.clone()
    blind = Labels(lambda found, _: found.sum().detach())
    nothing = gathered(Loop(), (given, label), curvature=blind)
    torch.testing.assert_close(nothing.inputs, theirs.inputs)


@pytest.mark.parametrize(("kind", "settings"), every_kind())
def test_the_moments_of_the_inputs_and_of_the_gradients_there(kind, settings) -> None:
    layer = make(kind, settings)
    axis = 1 if layer.batch_first else 0
    given = sequences(layer)[0]
    label = tensor_of(layer(given)[0].select(axis, -1).shape, seed=4)
    model = Wrapped(layer, lambda found: found[0].select(axis, -1))
    found = gathered(model, (given, label), curvature=Labels(summed))
    assert found.given is not None and not given.requires_grad
    rows = given.flatten(0, 1)
    torch.testing.assert_close(found.given.inputs, rows.mT @ rows / len(rows))
    assert found.given.positions == len(rows) / len(given)
    known = given.clone().requires_grad_()
    (model(known) * label).sum().backward()
    # Of a loss that is a mean over samples, which are along the first mode of a batch.
    at_inputs = known.grad.flatten(0, 1) * len(given) / len(label)
    torch.testing.assert_close(
        found.given.gradients["labels"], at_inputs.mT @ at_inputs / len(rows)
    )
    moments = moments_of("fisher", found, 0.0)
    assert moments.given is not None and moments.given.inputs.shape == (6, 6)
    assert moments.given.scale == found.given.positions / 2


def test_packed_inputs_count_without_their_padding() -> None:
    layer = make(nn.LSTM, {})
    parts = [tensor_of((length, layer.input_size), seed=length) for length in (2, 6, 3)]
    packed = pack_sequence(parts, enforce_sorted=False)
    model = Wrapped(layer, lambda found: found[0].data)
    found = gather(model, {"rnn": layer}, [packed], lambda m, b: m(b), [Identity()])["rnn"].given
    rows = torch.cat(parts)
    torch.testing.assert_close(found.inputs, rows.mT @ rows / 11)
    assert found.gradients["identity"].trace() > 0
