"""What a piece of work depends on, in words and hashes, to tell it from other work."""

import functools
import hashlib
import inspect
import itertools
import re
from collections.abc import Callable, Mapping, Sized
from typing import Any

import torch
from torch import nn

from rankfold.batches import Data, check_data, map_tensors
from rankfold.fingerprint import weights_sha256
from rankfold.version import __version__

_BATCHES = 20  # of data that is no list, so many are looked at


def request(
    model: nn.Module | None, data: Mapping[str, Data | None], settings: Mapping[str, Any]
) -> dict[str, str]:
    """By name: SHA-256 of the network and its code, of the data; the settings; the versions.

    Of a list all batches are looked at, of other data the first; they are read with torch's random
    numbers (on the CPU) as they will be, and left. Of functions and classes the source counts.
    """
    about = {"rankfold": __version__, "torch": torch.__version__}
    if model is not None:
        about["model"] = _hash(f"{weights_sha256(model)} {model!r} {_code_of(model)}")
    for name, batches in data.items():
        if batches is not None:
            about[name] = data_sha256(batches)
    return about | {name: told(value) for name, value in settings.items()}


def beyond_defaults(function: Callable[..., Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are not the defaults of the function's parameters."""
    parameters = inspect.signature(function).parameters
    return {
        name: value
        for name, value in settings.items()
        if told(value) != told(parameters[name].default)
    }


def data_sha256(data: Data) -> str:
    """SHA-256 of the tensors of the batches: of all in a list, else of the first, and their count.

    Raises CalibrationError for data that can be read only once.
    """
    check_data(data)
    digest = hashlib.sha256(f"{len(data) if isinstance(data, Sized) else ''}".encode())

    def note(tensor: torch.Tensor) -> torch.Tensor:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(raw.numpy().data)
        return tensor

    with torch.random.fork_rng(devices=[]):
        count = None if isinstance(data, list | tuple) else _BATCHES
        for batch in itertools.islice(data, count):
            map_tensors(batch, note)
    return digest.hexdigest()


def told(value: Any) -> str:
    """A setting as text, the same in every process."""
    if isinstance(value, functools.partial):
        return f"{told(value.func)} {told(value.args)} {told(value.keywords)}"
    if inspect.isroutine(value) or inspect.isclass(value):
        name = f"{value.__module__}.{value.__qualname__}"
        return f"{name} {_hash(_source(value))[:16]}"
    if isinstance(value, list | tuple):
        return ", ".join(map(told, value))
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _code_of(model: nn.Module) -> str:
    """The sources of the classes of its modules, but for torch's own."""
    kinds = {type(module) for module in model.modules()}
    names = {f"{one.__module__}.{one.__qualname__}": one for one in kinds}
    return "".join(_source(names[n]) for n in sorted(names) if not n.startswith("torch."))


def _source(code: Any) -> str:
    try:
        return inspect.getsource(code)
    except (OSError, TypeError):  # typed in, or not written in Python
        return ""


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
