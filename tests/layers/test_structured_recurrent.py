"""Recurrent layers whose products of inputs are structured."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from rankfold.errors import UnsupportedLayerError
from rankfold.layers import (
    BlockTermLinear,
    StructuredRecurrent,
    TensorRingLinear,
    TensorTrainLinear,
)

FORMS = {
    "train": lambda i, o: TensorTrainLinear(i, o, 3, bias=False),
    "ring": lambda i, o: TensorRingLinear(i, o, 2, bias=False),
    "block term": lambda i, o: BlockTermLinear(i, o, 2, 2, bias=False),
}
LAYERS = [
    lambda: nn.LSTM(12, 6, batch_first=True),
    lambda: nn.GRU(12, 6, bidirectional=True),
    lambda: nn.RNN(12, 6, num_layers=2, nonlinearity="relu", bias=False),
    lambda: nn.LSTM(12, 6, num_layers=2, bidirectional=True, dropout=0.3, proj_size=4),
]


def close(first, second) -> None:
    if isinstance(first, tuple):
        for one, other in zip(first, second, strict=True):
            close(one, other)
    elif first is not None:
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_it_does_what_the_dense_layer_does(make, form) -> None:
    """Of sequences in batches, of one, without a batch, and packed ones."""
    layer = StructuredRecurrent(make(), form).eval()
    dense = layer.to_dense()
    assert repr(dense) == repr(make())
    packed = pack_sequence([torch.randn(n, 12) for n in (2, 5, 3)], enforce_sorted=False)
    for inputs in (torch.randn(4, 3, 12), torch.randn(1, 1, 12), torch.randn(7, 12), packed):
        with torch.no_grad():
            close(tuple(layer(inputs)), tuple(dense(inputs)))
        close(tuple(layer(inputs)), tuple(dense(inputs)))


@pytest.mark.parametrize("inputs", [torch.randn(3, 0, 12), torch.randn(0, 3, 12)])
def test_empty_inputs_are_met_as_torch_meets_them(inputs) -> None:
    layer = StructuredRecurrent(nn.LSTM(12, 6, batch_first=True), FORMS["train"])
    dense = layer.to_dense()
    try:
        expected = dense(inputs)
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=str(error)[:20]):
            layer(inputs)
    else:
        close(layer(inputs), expected)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_gradients_reach_the_factors(form) -> None:
    recurrent = nn.LSTM(12, 5, dtype=torch.float64)
    layer = StructuredRecurrent(recurrent, form)
    assert not any(name.endswith("weight_ih_l0") for name in dict(recurrent.named_parameters()))
    inputs = torch.randn(3, 2, 12, dtype=torch.float64)
    names = [name for name, _ in layer.named_parameters()]

    def outputs(*parameters):
        found = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), inputs)
        return found[0].square().sum()

    assert torch.autograd.gradcheck(outputs, tuple(layer.parameters()), fast_mode=True)


def test_states_are_given_and_a_sequence_may_be_run_in_parts() -> None:
    layer = StructuredRecurrent(nn.LSTM(12, 6), FORMS["ring"])
    inputs = torch.randn(6, 2, 12)
    whole, last = layer(inputs)
    first, states = layer(inputs[:4])
    second, end = layer(inputs[4:], states)
    close((torch.cat([first, second]), *end), (whole, *last))


def test_it_trains_is_copied_and_round_trips() -> None:
    layer = StructuredRecurrent(nn.GRU(12, 6), FORMS["block term"])
    inputs = torch.randn(6, 2, 12)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    before = layer(inputs)[0].square().sum()
    before.backward()
    optimizer.step()
    after = layer(inputs)[0].square().sum()
    assert after < before
    other = copy.deepcopy(layer)
    close(other(inputs), layer(inputs))
    fresh = StructuredRecurrent(nn.GRU(12, 6), FORMS["block term"])
    fresh.load_state_dict(layer.state_dict())
    close(fresh(inputs), layer(inputs))


def test_structured_layers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UnsupportedLayerError, match="12 inputs to 24 outputs"):
        StructuredRecurrent(nn.LSTM(12, 6), lambda i, o: TensorTrainLinear(i, 12, 2, bias=False))
    with pytest.raises(UnsupportedLayerError, match="bias=False"):
        StructuredRecurrent(nn.LSTM(12, 6), lambda i, o: TensorTrainLinear(i, o, 2))
