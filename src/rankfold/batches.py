"""The one rule that says which part of a batch goes into the model and which is the label.

    a tensor                      the input; no label
    a tuple or list of one        the input; no label
    a tuple or list of two        the input, then the label
    a mapping                     keyword arguments; the entry "labels", if any, is the label

and an input that is itself a tuple is a sequence of positional arguments, one that is itself a
mapping a set of keyword arguments. A model that wants something else is run by a `forward`
function of the user's, `forward(model, batch) -> output`, which replaces the rule for inputs.
"""

import copy
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rankfold.errors import CalibrationError, ModelError

Data = Iterable[Any]
Forward = Callable[[nn.Module, Any], Any]


def split_batch(batch: Any) -> tuple[Any, Any]:
    """Split a batch into (input, label), label None where there is none.

    Raises CalibrationError for a batch that the rule does not cover.
    """
    if isinstance(batch, torch.Tensor):
        return batch, None
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key != "labels"}, batch.get("labels")
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes) and len(batch) in (1, 2):
        return batch[0], batch[1] if len(batch) == 2 else None
    size = f" of {len(batch)}" if isinstance(batch, Sequence) else ""
    raise CalibrationError(
        f"a batch is a tensor, (input,), (input, label) or a mapping, not a "
        f"{type(batch).__name__}{size}; pass forward= for anything else"
    )


def run(model: nn.Module, batch: Any) -> Any:
    """The `forward` of the rule above: run the model on the input of the batch."""
    inputs, _ = split_batch(batch)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor in it, however nested, moved to the device."""
    return map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))


def map_tensors(batch: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The batch with every tensor in it, however nested, changed."""
    if isinstance(batch, torch.Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        items = {key: map_tensors(value, change) for key, value in batch.items()}
        if not isinstance(batch, MutableMapping):
            return items
        moved = copy.copy(batch)  # what else a user's mapping holds stays with it
        moved.update(items)
        return moved
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(value, change) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(map_tensors(value, change) for value in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = [field.name for field in dataclasses.fields(batch) if field.init]
        return dataclasses.replace(
            batch, **{name: map_tensors(getattr(batch, name), change) for name in fields}
        )
    return batch


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """Every floating-point tensor in nested tuples, lists, mappings and dataclasses, in order."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_of(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_of(getattr(value, field.name))


def all_finite(value: Any) -> bool:
    """Whether no floating-point tensor in a value holds NaN or infinity."""
    # The extremes tell, NaN included, many times faster than a mask of all numbers.
    return all(
        torch.isfinite(extreme)
        for tensor in tensors_of(value)
        if tensor.numel()
        for extreme in tensor.detach().aminmax()
    )


def batch_size(batch: Any) -> int:
    """Samples in a batch: the length of its first tensor; 1 for a batch without tensors."""
    if isinstance(batch, torch.Tensor):
        return batch.shape[0] if batch.dim() else 1
    items = batch.values() if isinstance(batch, Mapping) else batch
    if isinstance(batch, Mapping | tuple | list):
        for item in items:
            if isinstance(item, torch.Tensor | Mapping | tuple | list):
                return batch_size(item)
    return 1


def check_data(data: Any) -> None:
    """Raise CalibrationError unless `data` yields batches and can be read again and again."""
    if isinstance(data, Iterator):
        raise CalibrationError(
            "the data can be read only once: pass a DataLoader or a list of batches, "
            f"not a {type(data).__name__}"
        )
    if isinstance(data, torch.Tensor | Mapping | str) or not isinstance(data, Iterable):
        raise CalibrationError(
            f"data is something that yields batches (a DataLoader, a list of batches), "
            f"not a {type(data).__name__}"
        )


def first_batches(data: Data, count: int | None, device: torch.device) -> Iterator[Any]:
    """The first `count` batches (None: all) on the device.

    Raises CalibrationError if there are none, if `data` can be read only once, or if reading it
    fails.
    """
    check_data(data)
    empty = True
    batches: Iterator[Any] | None = None
    for index in itertools.count() if count is None else range(count):
        try:
            batches = iter(data) if batches is None else batches
            batch = next(batches)
        except StopIteration:
            break
        except Exception as error:
            raise CalibrationError(f"reading batch {index} failed: {error!r}") from error
        empty = False
        yield to_device(batch, device)
    if empty:
        raise CalibrationError("the data yields no batch")


def held_out_first(data: Data, batches: int, held_out: int) -> tuple[Data, int, int]:
    """The batches to look at, those held out before the others, and how many there are of each.

    Of a sequence they come from all over it, in case it is sorted; of other data they are the
    first. Of data with fewer than were asked for, a fifth is held out; of a single batch nothing.
    Raises CalibrationError as `check_data` does.
    """
    check_data(data)
    most = batches + held_out
    there = len(data) if isinstance(data, Sized) else sum(1 for _ in itertools.islice(data, most))
    there = min(there, most)
    if there < 2:
        return data, 0, 1
    kept = min(held_out, max(1, there // 5))
    count = min(batches, there - kept)
    if not isinstance(data, Sequence):
        return data, kept, count
    total = kept + count
    chosen = [index * len(data) // total for index in range(total)]
    held = {chosen[(2 * index + 1) * total // (2 * kept)] for index in range(kept)}
    order = [*sorted(held), *(index for index in chosen if index not in held)]
    return [data[index] for index in order], kept, count


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer; the CPU if it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


@contextmanager
def running(model: nn.Module, train: bool = False) -> Iterator[nn.Module]:
    """Within: the model in eval mode (or `train=True`); after: every module in the mode it had."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield model.train(train)
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def uncompiled() -> Iterator[None]:
    """Within: what `torch.compile` made runs as it is written, so that hooks see it."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and to import it takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def run_or_explain(forward: Forward, model: nn.Module, batch: Any, index: int) -> Any:
    """Run the model on one batch; an error of its own becomes a ModelError that names the batch."""
    try:
        return forward(model, batch)
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        shapes = ", ".join("x".join(map(str, tensor.shape)) for tensor in tensors_of(batch))
        message = str(error).strip().splitlines()
        raise ModelError(
            f"the model fails on batch {index} ({shapes or 'no tensors'}): "
            f"{type(error).__name__}: {message[0] if message else 'no message'}"
        ) from error
