"""What a command line names, resolved: device, model, data, functions."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from rankfold import processes
from rankfold.batches import Data, Forward, run
from rankfold.checkpoint import read_plan_document
from rankfold.cli.console import people
from rankfold.errors import CalibrationError, CheckpointError, DeviceError
from rankfold.imports import resolve_data, resolve_function, resolve_model, resolve_text
from rankfold.measure import Metric
from rankfold.pretrained import is_pretrained

_OURS = {f"rankfold.demo:{name}" for name in ("make_model", "make_data", "make_test", "accuracy")}


def prepare(device: str, threads: int | None, seed: int) -> torch.device:
    """Set threads and seed, and check that the device is there."""
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
        processes.join(place)
        people.quiet = not processes.is_first()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DeviceError(f"device '{device}' cannot be used here: {reason}") from error
    return place


def load_inputs(
    model: str, data: str | None, text: str | None, test: str | None, place: torch.device
) -> tuple[nn.Module, Data, Data]:
    """The model on its device, in eval mode, the data, and the data to measure on."""
    if (data is None) == (text is None):
        raise CalibrationError(
            "give the batches with --data, or with --text a text to make them of"
        )
    network = resolve_model(model).to(place).eval()
    batches = resolve_data(data) if data is not None else resolve_text(text or "", model)
    return network, batches, resolve_data(test) if test else batches


def load_functions(forward: str | None, metric: str | None) -> tuple[Forward, Metric | None]:
    return (
        resolve_function(forward, "forward") if forward else run,
        resolve_function(metric, "metric") if metric else None,
    )


def origin_of(directory: Path, trust: bool) -> dict[str, str]:
    """What compress was given, as the directory remembers it.

    A saved model may be from anyone: what it names is imported and run only if it is trusted, and
    left out otherwise, but for directories of transformers, texts, and what ships with rankfold.
    """
    origin: dict[str, str] = read_plan_document(directory)["origin"]
    code = {} if trust else {key: name for key, name in origin.items() if _is_code(key, name)}
    if code:
        named = ", ".join(f"{key} {name}" for key, name in code.items())
        people.print(
            f"not run, since {directory} names it: {named}; --trust has it run",
            highlight=False,
            markup=False,
        )
    return {key: name for key, name in origin.items() if key not in code}


def _is_code(key: str, name: str) -> bool:
    if key == "text" or name in _OURS:
        return False
    return key != "model" or not is_pretrained(name)


def remembered(
    directory: Path,
    origin: Mapping[str, str],
    model: str | None,
    data: str | None,
    text: str | None,
) -> tuple[str, str | None, str | None]:
    """Model, data and text as given, or as compress was given them."""
    model = model or origin.get("model")
    if data is None and text is None:
        data, text = origin.get("test") or origin.get("data"), origin.get("text")
        text = None if data else text
    if model is None or (data is None and text is None):
        raise CheckpointError(
            f"{directory} does not say its model and data, or is not trusted to: give --model and "
            "--data, or --trust for what it names"
        )
    return model, data, text
