import copy

import pytest
import torch
from recurrent import HIDDEN, INPUTS, assert_same, every_kind, make, sequences, start_of
from tensors import tensor_of
from torch import nn

from rankfold.errors import RankError
from rankfold.layers import FewerUnits, block_names, directions_of

every = pytest.mark.parametrize(("kind", "settings"), every_kind())


def filled(layer, units: int) -> FewerUnits:
    """With weights of its own, that keep the kept units as they are; in float64."""
    form = FewerUnits(layer, units)
    with torch.no_grad():
        for index, parameter in enumerate(form.parameters()):
            parameter.copy_(0.2 * tensor_of(parameter.shape, seed=20 + index))
        for block in range(len(form.states)):
            form.kept[block] = torch.randperm(HIDDEN)[:units].sort().values
            form.states[block][:, form.kept[block]] = torch.eye(units).double()
        top = form.states[-directions_of(layer) :]
        form.readout.weight.copy_(torch.block_diag(*top).mT)
    return form


@every
def test_it_has_the_shapes_of_the_dense_layer(kind, settings) -> None:
    layer = make(kind, settings)
    form = filled(layer, 10)
    assert type(form.recurrent) is kind and form.recurrent.hidden_size == 10
    for name in ("input_size", "hidden_size", "num_layers", "batch_first", "bidirectional"):
        assert getattr(form, name) == getattr(layer, name)
    form.flatten_parameters()
    for given in sequences(layer):
        for start in (None, start_of(layer, given)):
            ours, theirs = form(given, start), layer(given, start)
            assert type(ours[0]) is type(theirs[0]) and type(ours[1]) is type(theirs[1])
            for one, other in zip(flat(ours), flat(theirs), strict=True):
                assert one.shape == other.shape


def flat(found) -> list[torch.Tensor]:
    if isinstance(found, torch.Tensor):
        return [found]
    return [tensor for part in found if part is not None for tensor in flat(part)]


@every
def test_the_outputs_are_read_from_the_smaller_layer(kind, settings) -> None:
    layer = make(kind, settings)
    form = filled(layer, 10)
    given = sequences(layer)[0]
    kept_states = form.restricted(start_of(layer, given))
    output, states = form(given, start_of(layer, given))
    small, small_states = form.recurrent(given, kept_states)
    assert_same(output, small @ form.readout.weight.mT)
    assert_same(form.restricted(states), small_states)
    # The last output of the first direction is the top layer's state there.
    last = output[:, -1] if layer.batch_first else output[-1]
    first = (states[0] if kind is nn.LSTM else states)[-directions_of(layer)]
    assert_same(last[:, :HIDDEN], first)


@every
def test_a_sequence_in_two_parts_is_the_whole(kind, settings) -> None:
    """States go out and come in again; all but what a backward direction sees."""
    settings = {**settings, "bidirectional": False}
    form = filled(make(kind, settings), 10)
    steps = 1 if form.batch_first else 0
    given = tensor_of((4, 7, INPUTS), seed=3) if steps else tensor_of((7, 4, INPUTS), seed=3)
    first, second = given.split((3, 4), steps)
    output, states = form(first)
    rest, _ = form(second, states)
    assert_same(torch.cat([output, rest], steps), form(given)[0])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_it_is_exported_and_its_weights_are_loaded(kind) -> None:
    layer = make(kind, {"bidirectional": True})
    form = filled(layer, 10).eval()
    given = sequences(layer)[0]
    start = start_of(layer, given)
    exported = torch.export.export(form, (given, start)).module()
    assert_same(exported(given, start), form(given, start))
    other = FewerUnits(layer, 10)
    other.load_state_dict(copy.deepcopy(form.state_dict()))
    assert_same(other(given, start), form(given, start), 0)


def test_blocks_are_named_as_torch_names_them() -> None:
    layer = nn.GRU(4, 8, num_layers=2, bidirectional=True)
    assert block_names(layer) == ["_l0", "_l0_reverse", "_l1", "_l1_reverse"]
    assert all(hasattr(layer, f"weight_hh{name}") for name in block_names(layer))
    assert directions_of(layer) == 2 and block_names(nn.GRU(4, 8)) == ["_l0"]


@pytest.mark.parametrize("units", [0, HIDDEN + 1])
def test_units_outside_the_layer_are_refused(units) -> None:
    with pytest.raises(RankError):
        FewerUnits(make(nn.LSTM, {}), units)


def test_dropout_and_mode_are_kept() -> None:
    layer = nn.LSTM(4, 16, num_layers=2, dropout=0.25)
    assert FewerUnits(layer, 8).recurrent.dropout == 0.25
    assert FewerUnits(layer, 8).training and not FewerUnits(layer.eval(), 8).recurrent.training
