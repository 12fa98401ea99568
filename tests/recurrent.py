"""Recurrent layers of every kind, with inputs that fit them."""

from itertools import product
from typing import Any

import pytest
import torch
from tensors import tensor_of, weight_of
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from rankfold.layers import block_names
from rankfold.methods import Moments

INPUTS, HIDDEN = 6, 24


def every_kind() -> list[Any]:
    """LSTM, GRU, RNN; both nonlinearities; layers, directions, biases, batch_first."""
    kinds: list[tuple[type[nn.RNNBase], dict[str, Any]]] = [
        (nn.LSTM, {}),
        (nn.GRU, {}),
        (nn.RNN, {}),
        (nn.RNN, {"nonlinearity": "relu"}),
    ]
    shapes = [
        {},
        {"bidirectional": True, "batch_first": True},
        {"num_layers": 2, "bias": False},
        {"num_layers": 2, "bidirectional": True},
    ]
    return [
        pytest.param(kind, {**shape, **more}, id=f"{kind.__name__}-{index}-{more}")
        for (kind, more), (index, shape) in product(kinds, enumerate(shapes))
    ]


def make(
    kind: type[nn.RNNBase], settings: dict[str, Any], dtype: torch.dtype = torch.float64
) -> Any:
    """In eval mode, of weights that make the states neither vanish nor saturate."""
    layer = kind(INPUTS, HIDDEN, dtype=dtype, **settings).eval()
    with torch.no_grad():
        for index, parameter in enumerate(layer.parameters()):
            parameter.copy_(0.15 * tensor_of(parameter.shape, seed=index))
    return layer


def every_cell() -> list[Any]:
    """LSTM, GRU and RNN cells, and the layers of one direction that do the same."""
    kinds: list[tuple[type[nn.RNNCellBase], type[nn.RNNBase], dict[str, Any]]] = [
        (nn.LSTMCell, nn.LSTM, {}),
        (nn.GRUCell, nn.GRU, {"bias": False}),
        (nn.RNNCell, nn.RNN, {}),
        (nn.RNNCell, nn.RNN, {"nonlinearity": "relu"}),
    ]
    return [
        pytest.param(*case, id=f"{case[0].__name__}-{index}") for index, case in enumerate(kinds)
    ]


def cell_of(kind: type[nn.RNNCellBase], layer: Any) -> Any:
    """The cell of this kind with the weights of a recurrent layer of one direction."""
    settings = {"nonlinearity": layer.nonlinearity} if kind is nn.RNNCell else {}
    made: Any = kind(INPUTS, HIDDEN, bias=layer.bias, dtype=layer.weight_hh_l0.dtype, **settings)
    made.load_state_dict({n.removesuffix("_l0"): v for n, v in layer.state_dict().items()})
    return made.eval()


def run_cell(cell: Any, steps: torch.Tensor, start: Any = None) -> tuple[torch.Tensor, Any]:
    """What a recurrent layer would return: (steps, ..., hidden), and the last states."""
    states, outputs = start, []
    for step in steps:
        states = cell(step, states)
        outputs.append(states[0] if isinstance(states, tuple) else states)
    return torch.stack(outputs), states


def moments_for(layer: Any, known: str = "both", rank: int | None = None) -> Moments:
    """Of each layer and direction its own; `rank` of singular ones."""

    def stacked(seed: int) -> torch.Tensor:
        blocks = range(len(block_names(layer)))
        return torch.stack([weight_of(layer.hidden_size, seed + b, rank) for b in blocks])

    return Moments(
        stacked(1) if known in ("states", "both") else None,
        stacked(11) if known in ("gradients", "both") else None,
    )


def sequences(
    layer: Any, seed: int = 0, dtype: torch.dtype = torch.float64
) -> list[torch.Tensor | PackedSequence]:
    """Batched, unbatched and packed."""
    shape = (3, 5, INPUTS) if layer.batch_first else (5, 3, INPUTS)
    lengths = (2, 5, 3)
    return [
        tensor_of(shape, dtype, seed=seed),
        tensor_of((4, INPUTS), dtype, seed=seed + 1),
        pack_sequence(
            [tensor_of((n, INPUTS), dtype, seed=seed + n) for n in lengths], enforce_sorted=False
        ),
    ]


def start_of(layer: Any, given: torch.Tensor | PackedSequence, seed: int = 0) -> Any:
    """Initial states for an input."""
    batch = () if isinstance(given, torch.Tensor) and given.dim() == 2 else (3,)
    directions = 2 if layer.bidirectional else 1
    shape = (layer.num_layers * directions, *batch, layer.hidden_size)
    states = tuple(0.5 * tensor_of(shape, seed=seed + index) for index in range(2))
    return states if isinstance(layer, nn.LSTM) else states[0]


def assert_same(ours: Any, theirs: Any, tolerance: float = 1e-12) -> None:
    """Outputs and states, tensor by tensor, packed or not."""
    if isinstance(theirs, torch.Tensor):
        assert ours.shape == theirs.shape
        error = (ours.double() - theirs.double()).norm()
        assert error <= tolerance * max(theirs.double().norm().item(), 1e-300)
    elif theirs is None:
        assert ours is None
    else:
        assert type(ours) is type(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other, tolerance)
