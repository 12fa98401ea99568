from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from rankfold.analysis.survey import survey
from rankfold.batches import run


class Reads(nn.Module):
    """A GRU, two linear layers, and what is done with them."""

    def __init__(self, body: Callable[["Reads", torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 16, batch_first=True)
        self.first = nn.Linear(16, 6)
        self.second = nn.Linear(16, 6)
        self.body = body

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return self.body(self, given)


def reader(body: Callable[[Reads, torch.Tensor], torch.Tensor]) -> str | None:
    model = Reads(body).eval()
    (found,) = (
        layer.reader
        for layer in survey(model, [torch.randn(2, 5, 4)], run, 1).layers
        if layer.name == "rnn"
    )
    return found


def state_of(self: Reads, given: torch.Tensor) -> torch.Tensor:
    return torch.zeros(1, len(given), 16)


ALONE = {
    "one": lambda self, x: self.first(self.rnn(x)[0]),
    "with an activation after it": lambda self, x: self.first(self.rnn(x)[0]).relu(),
    "called twice": lambda self, x: self.first(self.rnn(x)[0]) + self.first(self.rnn(x + 1)[0]),
    "through an identity": lambda self, x: self.first(nn.Sequential()(self.rnn(x)[0])),
}
NOT_ALONE = {
    "nobody": lambda self, x: self.first(x.sum() + torch.zeros(2, 16)),
    "two": lambda self, x: self.first(self.rnn(x)[0]) + self.second(self.rnn(x)[0]),
    "two of one call": lambda self, x: (lambda h: self.first(h) + self.second(h))(self.rnn(x)[0]),
    "an activation": lambda self, x: self.first(self.rnn(x)[0].relu()),
    "a slice": lambda self, x: self.first(self.rnn(x)[0][:, -1]),
    "a residual": lambda self, x: (lambda h: self.first(h) + h[..., :6])(self.rnn(x)[0]),
    "the caller": lambda self, x: self.rnn(x)[0],
    "the caller too": lambda self, x: (lambda h: (self.first(h), h))(self.rnn(x)[0]),
    "of the state": lambda self, x: self.first(self.rnn(x)[1]),
    "and of the state": lambda self, x: (lambda f: self.first(f[0]) + f[1].sum())(self.rnn(x)),
    "the state, returned": lambda self, x: (lambda f: (self.first(f[0]), f[1]))(self.rnn(x)),
    "with a given state": lambda self, x: self.first(self.rnn(x, state_of(self, x))[0]),
    "with a state by name": lambda self, x: self.first(self.rnn(x, hx=state_of(self, x))[0]),
    "of something else too": lambda self, x: (
        self.first(self.rnn(x)[0]) + self.first(torch.ones(2, 5, 16))
    ),
    "past the layer": lambda self, x: nn.functional.linear(self.rnn(x)[0], self.first.weight),
    "in a list": lambda self, x: self.first(torch.cat([self.rnn(x)[0]])),
}


def packed(self: Reads, given: torch.Tensor) -> torch.Tensor:
    return self.first(self.rnn(pack_padded_sequence(given, [5, 5], batch_first=True))[0].data)


@pytest.mark.parametrize("body", ALONE.values(), ids=ALONE)
def test_one_linear_layer_reads_the_outputs(body) -> None:
    assert reader(body) == "first"


@pytest.mark.parametrize("body", NOT_ALONE.values(), ids=NOT_ALONE)
def test_something_else_reads_them(body) -> None:
    assert reader(body) is None


def test_of_a_packed_sequence_the_data_are_read() -> None:
    assert reader(packed) == "first"


def test_a_reader_that_must_stay_as_it_is_takes_nothing_in() -> None:
    model = Reads(ALONE["one"]).eval()
    model.first.register_forward_hook(lambda *_: None)
    layers = survey(model, [torch.randn(2, 5, 4)], run, 1).layers
    assert [layer.reader for layer in layers] == [None, None, None]


def test_packed_sequences_have_the_shape_of_one_sequence_of_all_steps() -> None:
    model = Reads(packed).eval()
    found = survey(model, [torch.randn(2, 5, 4)], run, 1)
    assert found.layers[0].input_shapes == ((10, 4),)
    assert found.macs == 10 * (3 * 16 * (4 + 16) + 16 * 6)
