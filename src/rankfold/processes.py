"""Several processes that do one piece of work together.

They are started by `torchrun` or `accelerate launch`, each with the same command and the same data,
and go through the same calls in the same order; a program in which one process alone calls rankfold
does so within `by_itself()`. With one process everything here does nothing.
"""

import atexit
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed

from rankfold.progress import Progress, silent

T = TypeVar("T")
R = TypeVar("R")

_alone = False  # within what one process does for all


def join(device: torch.device) -> None:
    """Meet the other processes, if the environment says that there are any (`WORLD_SIZE`)."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not _initialized() and not _alone:
        from accelerate import PartialState

        PartialState(cpu=device.type == "cpu")
        # Threads of gloo that outlive the interpreter abort the process.
        atexit.register(_part)


def leave() -> bool:
    """Part from the others, who need not wait any more; whether this was the first process."""
    was_first = is_first()
    if _initialized():
        torch.distributed.barrier()
    _part()
    return was_first


def count() -> int:
    """How many there are that work together here."""
    return torch.distributed.get_world_size() if _initialized() and not _alone else 1


def index() -> int:
    """Which one this is, from 0 on."""
    return torch.distributed.get_rank() if count() > 1 else 0


def is_first() -> bool:
    """Whether this is the one that writes files and talks to the user."""
    return index() == 0


def own(items: Sequence[T]) -> list[T]:
    """The share of this process in items that all of them have."""
    return list(items[index() :: count()])


def gathered(value: T) -> list[T]:
    """What every process gives here, in their order."""
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    torch.distributed.all_gather_object(found, value)
    return found


def mean(value: float) -> float:
    """Of all processes' values."""
    return sum(gathered(value)) / count()


def add_up(sums: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The sums over processes of what they have under each name, which not all need have."""
    if count() == 1:
        return dict(sums)
    known: dict[str, torch.Tensor] = {}
    for found in gathered({name: one.to("meta") for name, one in sums.items()}):
        known |= found
    device = torch.device("cpu")
    if torch.distributed.get_backend() == "nccl":
        device = torch.device("cuda", torch.cuda.current_device())
    total = {}
    for name in sorted(known):
        mine = sums.get(name)
        one = torch.zeros_like(known[name], device=device) if mine is None else mine.to(device)
        one = one.clone().contiguous()
        torch.distributed.all_reduce(one)
        total[name] = one if mine is None else one.to(mine.device)
    return total


def shared_out(
    items: Sequence[T],
    work: Callable[[T], R],
    progress: Progress = silent,
    description: str = "",
) -> list[R]:
    """`work(item)` of every item, each done by one process and known to all.

    What one process fails with, all do: the error of the first item that failed.
    """
    mine = own(items)
    watched = progress(mine, description, len(mine))
    if count() == 1:
        return [work(item) for item in watched]
    done = gathered([_attempt(partial(work, item)) for item in watched])
    return [_result(done[place % count()][place // count()]) for place in range(len(items))]


def from_first(work: Callable[[], R]) -> R:
    """What the first process makes, known to all: of what is measured, all must think alike."""
    if count() == 1:
        return work()
    return _result(gathered(_attempt(work) if index() == 0 else None)[0])


def seed_of(seed: int, item: int) -> int:
    """A seed for what is drawn for one of many items: the same whoever takes it.

    Of 32 bits, since torch's generator of the CPU looks at no more.
    """
    return (seed * 2_654_435_761 + item) % 2**32


@contextmanager
def by_itself() -> Iterator[None]:
    """Within: this process waits for no other, for what it alone is to do."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def _attempt(work: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        with by_itself():
            return work(), None
    except Exception as error:
        return None, error


def _result(attempt: Any) -> Any:
    value, error = attempt
    if error is not None:
        raise error
    return value


def _part() -> None:
    if _initialized():
        torch.distributed.destroy_process_group()


def _initialized() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
