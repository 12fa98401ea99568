"""Blocks of a network trained one by one, each towards what the original's gave."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from rankfold.analysis.divergence import Judge
from rankfold.batches import (
    Data,
    Forward,
    device_of,
    first_batches,
    held_out_first,
    map_tensors,
    run,
    run_or_explain,
    running,
)
from rankfold.distances import Distance, SquaredError
from rankfold.errors import ModelError
from rankfold.progress import Progress, silent
from rankfold.recover.recover import recover
from rankfold.refit import Refit, Refitted


def recover_blocks(
    model: nn.Module,
    teacher: nn.Module,
    data: Data,
    blocks: Sequence[str],
    *,
    distance: Distance = SquaredError(),  # noqa: B008  (frozen)
    forward: Forward = run,
    batches: int = 16,
    held_out: int = 4,
    epochs: int = 8,
    learning_rate: float = 3e-4,
    seed: int = 0,
    progress: Progress = silent,
) -> Refit:
    """Train the named blocks of a factorized network, each by itself, in their order, in place.

    What `refit` does in closed form for the last factors, by gradients for all weights of a block
    (a layer, or modules with several): on the inputs that it gets in `model` it is trained by
    `recover` towards the outputs of the same block in the original, `teacher`, for the inputs that
    it gets there (asymmetric, as Zhang et al. 2016, section 3.3). No gradient goes beyond a block,
    so that a large network takes the memory of one, and of what it is given and gives for so many
    `batches`; these are all that is needed. Of `data`, `held_out` batches judge, as in `refit`: a
    block that brings the outputs no nearer there is put back as it was, so that the divergence
    never grows. Blocks are better in the order in which they run.

    Raises ModelError for a block that a network lacks or does not call once in a pass,
    CalibrationError for data that yields nothing. Blocks that keep something from pass to pass (a
    cache of keys and values) are to be run without: give a `forward` that says so.
    """
    ordered, kept, count = held_out_first(data, batches, held_out)
    found = list(first_batches(ordered, kept + count, device_of(model)))
    held, used = found[:kept] or found, found[kept:]
    judge = Judge.of(teacher, forward, held, None)
    divergence = judge.divergence_of(model)
    done = []
    for name in progress(blocks, "recovering blocks"):
        block = _block(model, name)
        before = copy.deepcopy(block.state_dict())
        given, validation = (
            [_replayable(model, teacher, name, *one, forward) for one in enumerate(several)]
            for several in (used, held)
        )
        recover(
            block,
            given,
            teacher=_Recorded(),
            distance=distance,
            validation=validation,
            forward=_replay,
            epochs=epochs,
            learning_rate=learning_rate,
            seed=seed,
        )
        reached = judge.divergence_of(model)
        done.append(Refitted(name, divergence, reached, reached < divergence))
        if reached < divergence:
            divergence = reached
        else:
            block.load_state_dict(before)
    return Refit(tuple(done))


class _Recorded(nn.Module):
    """In the place of the original's block: gives what that gave."""


def _replay(module: nn.Module, batch: Any) -> Any:
    args, named, made = batch
    if isinstance(module, _Recorded):
        return made
    args, named = map_tensors((args, named), torch.clone)  # for the next time
    return module(*args, **named)


def _block(network: nn.Module, name: str) -> nn.Module:
    try:
        return network.get_submodule(name)
    except AttributeError as error:
        raise ModelError(f"the network has no block '{name}'") from error


def _replayable(
    model: nn.Module, teacher: nn.Module, name: str, index: int, batch: Any, forward: Forward
) -> tuple[Any, Any, Any]:
    """What a block is given in the model, in order and by name, and gives in the teacher."""
    (args, named), _ = _call(model, name, index, batch, forward)
    return args, named, _call(teacher, name, index, batch, forward)[1]


def _call(network: nn.Module, name: str, index: int, batch: Any, forward: Forward) -> list[Any]:
    """What a block was given in a pass, and what it gave."""
    seen: list[Any] = []

    def note_inputs(module: nn.Module, args: Any, named: Any) -> None:
        seen.append(map_tensors((args, named), torch.clone))  # as they are before the block runs

    def note_output(module: nn.Module, args: Any, made: Any) -> None:
        seen.append(map_tensors(made, torch.clone))  # as they are before others change them

    block = _block(network, name)
    hooks = [
        block.register_forward_pre_hook(note_inputs, with_kwargs=True),
        block.register_forward_hook(note_output),
    ]
    try:
        with running(network), torch.no_grad():
            run_or_explain(forward, network, batch, index)
    finally:
        for hook in hooks:
            hook.remove()
    if len(seen) != 2:
        raise ModelError(f"block '{name}' is called {len(seen) // 2} times in a pass, not once")
    return seen
