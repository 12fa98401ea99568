"""A recurrent layer run step by step, so that its states can be seen, and gradients at them.

Torch's own layers run all steps at once and show neither the states of the lower layers nor what
the next step makes of a state.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from rankfold.layers import Recurrent, block_names, directions_of

# Called with the number of the layer and direction, as in h_n, and with the states of one step,
# (sequences, hidden); what it returns takes their place.
Seen = Callable[[int, torch.Tensor], torch.Tensor]


def run_unrolled(layer: Recurrent, given: Any, hx: Any, seen: Seen) -> tuple[Any, Any]:
    """What `layer(given, hx)` returns, in eval mode, with every state shown to `seen`."""
    packed = isinstance(given, PackedSequence)
    if packed:
        batched = True
        steps = list(given.data.split(given.batch_sizes.tolist()))
    else:
        batched = given.dim() == 3
        whole = given if batched else given[:, None]
        steps = list(whole.unbind(1 if layer.batch_first and batched else 0))
    start = _start(layer, steps[0], hx, batched, given.sorted_indices if packed else None)
    finals = []
    names = block_names(layer)
    for first in range(0, len(names), directions_of(layer)):
        outputs = []
        for block in range(first, first + directions_of(layer)):
            backward = block > first
            order = list(reversed(steps)) if backward else steps
            states, final = _run(layer, names[block], block, order, [s[block] for s in start], seen)
            outputs.append(list(reversed(states)) if backward else states)
            finals.append(final)
        steps = [torch.cat(both, -1) for both in zip(*outputs, strict=True)]
    final_states = [torch.stack(states) for states in zip(*finals, strict=True)]
    if packed:
        if given.unsorted_indices is not None:
            final_states = [s.index_select(1, given.unsorted_indices) for s in final_states]
        output: Any = PackedSequence(torch.cat(steps), *given[1:])
    else:
        output = torch.stack(steps, 1 if layer.batch_first and batched else 0)
        if not batched:
            output, final_states = output[:, 0], [states[:, 0] for states in final_states]
    return output, tuple(final_states) if isinstance(layer, nn.LSTM) else final_states[0]


def _start(
    layer: Recurrent, step: torch.Tensor, hx: Any, batched: bool, order: torch.Tensor | None
) -> list[torch.Tensor]:
    """The initial states (layers and directions, sequences, hidden): h, and c of an LSTM."""
    if hx is None:
        shape = (len(block_names(layer)), len(step), layer.hidden_size)
        return [step.new_zeros(shape)] * (2 if isinstance(layer, nn.LSTM) else 1)
    states = list(hx) if isinstance(layer, nn.LSTM) else [hx]
    if not batched:
        states = [state[:, None] for state in states]
    return states if order is None else [state.index_select(1, order) for state in states]


def _run(
    layer: Recurrent,
    name: str,
    block: int,
    steps: Sequence[torch.Tensor],
    start: Sequence[torch.Tensor],
    seen: Seen,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The h of every step, and the last states: of one direction of one layer.

    Steps may be of fewer sequences than there are: the first ones, as in a `PackedSequence`.
    """
    weights = [getattr(layer, f"{kind}{name}") for kind in ("weight_ih", "weight_hh")]
    if layer.bias:
        weights += [getattr(layer, f"{kind}{name}") for kind in ("bias_ih", "bias_hh")]
    states, found = list(start), []
    for step in steps:
        active = len(step)
        new = _cell(layer, step, [state[:active] for state in states], weights)
        new[0] = seen(block, new[0])
        found.append(new[0])
        if active < len(states[0]):
            new = [torch.cat([n, old[active:]]) for n, old in zip(new, states, strict=True)]
        states = new
    return found, states


def _cell(
    layer: Recurrent,
    step: torch.Tensor,
    states: list[torch.Tensor],
    weights: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    if isinstance(layer, nn.LSTM):
        return list(torch.lstm_cell(step, states, *weights))
    if isinstance(layer, nn.GRU):
        return [torch.gru_cell(step, states[0], *weights)]
    cell = torch.rnn_tanh_cell if layer.nonlinearity == "tanh" else torch.rnn_relu_cell
    return [cell(step, states[0], *weights)]
