"""Recurrent layers as the nodes that ONNX has for them.

To know the shapes of an LSTM's outputs, torch's exporter goes through it step by step, which takes
a minute where sequences are long and can fix their length. ONNX has nodes for whole layers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from rankfold.layers.recurrent import RECURRENT, Recurrent, block_names, directions_of

_GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}  # torch's, in the order of ONNX
_NODES = "onnx_nodes"


@contextmanager
def with_recurrent_nodes(model: nn.Module) -> Iterator[None]:
    """Within, recurrent layers of `model` are nodes of ONNX: for its exporter alone."""
    layers: list[Any] = [one for one in model.modules() if _has_node(one)]
    nodes = [RecurrentNodes(layer) for layer in layers]
    for layer, ones in zip(layers, nodes, strict=True):
        layer.add_module(_NODES, ones)
        layer.forward = partial(_through_nodes, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
            delattr(layer, _NODES)


def _has_node(module: nn.Module) -> bool:
    """Of torch's own layers whose forward is their own still; torch 2.8 and later."""
    own = type(module) in RECURRENT and "forward" not in vars(module)
    return own and hasattr(torch.onnx, "ops")


def _through_nodes(layer: Any, input: Any, hx: Any = None) -> Any:  # noqa: A002  (torch's name)
    if not isinstance(input, torch.Tensor):  # packed sequences have lengths of their own
        return type(layer).forward(layer, input, hx)
    return getattr(layer, _NODES)(input, hx)


class RecurrentNodes(nn.Module):
    """A node for each layer of an `nn.LSTM`, `nn.GRU` or `nn.RNN`, called as that is.

    Outputs have its shapes and dtype, and no values: those are the exported file's. ONNX knows no
    projected states. Where h = P o tanh(c), the node's are o tanh(c), its recurrent matrix is R P,
    and what it gives is projected.
    """

    def __init__(self, layer: Recurrent) -> None:
        super().__init__()
        self.kind = type(layer).__name__
        self.depth, self.directions = layer.num_layers, directions_of(layer)
        self.hidden_size, self.batch_first = layer.hidden_size, layer.batch_first
        self.attributes: dict[str, Any] = {
            "hidden_size": layer.hidden_size,
            "direction": "bidirectional" if layer.bidirectional else "forward",
        }
        if self.kind == "GRU":
            self.attributes["linear_before_reset"] = 1
        if isinstance(layer, nn.RNN):
            self.attributes["activations"] = [layer.nonlinearity.capitalize()] * self.directions
        names = block_names(layer)
        for index in range(self.depth):
            blocks = names[index * self.directions : (index + 1) * self.directions]
            recurrent = _stacked(layer, "weight_hh", blocks)
            if getattr(layer, "proj_size", 0):
                projections = [getattr(layer, f"weight_hr{block}").detach() for block in blocks]
                projection = torch.stack(projections)
                recurrent = recurrent @ projection
                self.register_buffer(f"P{index}", projection)
                self.register_buffer(f"inverse{index}", torch.linalg.pinv(projection))
            self.register_buffer(f"W{index}", _stacked(layer, "weight_ih", blocks))
            self.register_buffer(f"R{index}", recurrent)
            if layer.bias:
                both = [_stacked(layer, name, blocks) for name in ("bias_ih", "bias_hh")]
                self.register_buffer(f"B{index}", torch.cat(both, dim=1))

    def forward(self, given: torch.Tensor, states: Any = None) -> Any:
        batched = given.dim() == 3
        if states is None:
            before: list[torch.Tensor] = []
        else:
            before = list(states) if self.kind == "LSTM" else [states]
        if not batched:
            given, before = given[:, None], [state[:, None] for state in before]
        elif self.batch_first:
            given = given.transpose(0, 1)
        after = []
        for index in range(self.depth):
            rows = slice(index * self.directions, (index + 1) * self.directions)
            given, *last = self.node(index, given, [state[rows] for state in before])
            after.append(last)
        ends = [torch.cat(one) for one in zip(*after, strict=True)]
        if not batched:
            given, ends = given[:, 0], [end[:, 0] for end in ends]
        elif self.batch_first:
            given = given.transpose(0, 1)
        return given, tuple(ends) if self.kind == "LSTM" else ends[0]

    def node(
        self, index: int, given: torch.Tensor, states: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Sequences first, (length, batch, directions * hidden), and the final states."""
        length, batch = given.shape[:2]
        state = (self.directions, batch, self.hidden_size)
        shapes = [(length, *state), *[state] * (2 if self.kind == "LSTM" else 1)]
        weights = [getattr(self, f"{name}{index}", None) for name in "WRB"]
        projection = getattr(self, f"P{index}", None)
        if projection is not None and states:
            hidden, cells = states
            states = [hidden @ getattr(self, f"inverse{index}").mT, cells]
        lengths = None  # all are as long
        output, *ends = torch.onnx.ops.symbolic_multi_out(
            self.kind,
            (given, *weights, lengths, *states),
            self.attributes,
            dtypes=[given.dtype] * len(shapes),
            shapes=shapes,
        )
        if projection is not None:
            output, ends[0] = output @ projection.mT, ends[0] @ projection.mT
        return [output.transpose(1, 2).flatten(2), *ends]


def _stacked(layer: Recurrent, name: str, blocks: list[str]) -> torch.Tensor:
    """(directions, gates * hidden, ...): the parameters of so many blocks, gates as in ONNX."""
    order = _GATES[type(layer).__name__]
    parameters = [getattr(layer, name + block).detach() for block in blocks]
    gates = [parameter.chunk(len(order)) for parameter in parameters]
    return torch.stack([torch.cat([one[place] for place in order]) for one in gates])
