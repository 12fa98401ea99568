"""Memory that does not suffice: which piece of work it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rankfold.errors import DeviceError


@contextmanager
def enough_memory_for(what: str) -> Iterator[None]:
    """Within: memory that runs out becomes a DeviceError that says at what."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_of_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DeviceError(f"out of memory at {what}: {reason:.200}") from error


def _is_of_memory(error: MemoryError | RuntimeError) -> bool:
    """On the CPU torch raises a plain RuntimeError."""
    return isinstance(
        error, MemoryError | torch.OutOfMemoryError
    ) or "can't allocate memory" in str(error)
