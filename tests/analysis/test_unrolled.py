import pytest
import torch
from recurrent import assert_same, every_kind, make, sequences, start_of
from tensors import tensor_of
from torch import nn

from rankfold.analysis.unrolled import run_unrolled

every = pytest.mark.parametrize(("kind", "settings"), every_kind())


@every
def test_step_by_step_it_is_the_same(kind, settings) -> None:
    layer = make(kind, settings)
    for given in sequences(layer):
        for start in (None, start_of(layer, given)):
            seen: dict[int, int] = {}

            def count(block, states, seen=seen):
                seen[block] = seen.get(block, 0) + len(states)
                return states

            assert_same(run_unrolled(layer, given, start, count), layer(given, start))
            steps = given.data if not isinstance(given, torch.Tensor) else given
            blocks = layer.num_layers * (2 if layer.bidirectional else 1)
            assert seen == dict.fromkeys(range(blocks), steps[..., 0].numel())


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_gradients_at_a_state_come_through_the_output_and_the_next_steps(kind) -> None:
    """As when the sequence is cut there and goes on from that state."""
    layer = make(kind, {})
    given = tensor_of((6, 2, layer.input_size), seed=4)
    found = []

    def watch(block, states):
        states = states.clone()
        states.retain_grad()
        found.append(states)
        return states

    weights = tensor_of((6, 2, layer.hidden_size), seed=5)
    output, _ = run_unrolled(layer, given, None, watch)
    (output * weights).sum().backward()
    _, states = layer(given[:3])
    cut = [s.detach().requires_grad_() for s in (states if kind is nn.LSTM else (states,))]
    tail, _ = layer(given[3:], tuple(cut) if kind is nn.LSTM else cut[0])
    (tail * weights[3:]).sum().backward()
    assert_same(found[2].grad, cut[0].grad[0] + weights[2], 1e-10)


@every
def test_what_seen_returns_takes_the_place_of_the_states(kind, settings) -> None:
    layer = make(kind, settings)
    given = sequences(layer)[0]
    output, states = run_unrolled(layer, given, None, lambda block, states: states * 0)
    assert output.abs().max() == 0
    assert (states[0] if kind is nn.LSTM else states).abs().max() == 0
