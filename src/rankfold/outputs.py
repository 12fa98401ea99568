"""What a network gives, and whether another that should give the same does."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rankfold.batches import Forward, device_of, run_or_explain, running, tensors_of
from rankfold.errors import ModelError


def outputs_of(model: nn.Module, batch: Any, forward: Forward) -> Any:
    """In eval mode; a model that draws random numbers draws the same each time."""
    device = device_of(model)
    devices = [] if device.type == "cpu" else [device]
    with (
        running(model),
        torch.no_grad(),
        torch.random.fork_rng(devices, device_type=device.type),
        _all_digits(),
    ):
        torch.manual_seed(0)
        return run_or_explain(forward, model, batch, 0)


def check_same(before: Any, after: Any, allowed: float, otherwise: str) -> None:
    """Raise ModelError, saying what is `otherwise`, unless nested outputs differ by rounding alone.

    `allowed` is the exponent of the dtype's machine epsilon that the norm of the difference may be
    of the norm of the first.
    """
    for one, other in zip(tensors_of(before), tensors_of(after), strict=True):
        most = torch.finfo(one.dtype).eps ** allowed
        if one.shape != other.shape or not _difference(one, other) <= most:
            raise ModelError(otherwise)


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Norm of the difference over that of the first."""
    norm = one.double().nan_to_num(0, 0, 0).norm().item()
    same = (one == other) | (one.isnan() & other.isnan())
    both = torch.where(same, 0, one.double() - other.double()).norm().item()
    return both / norm if norm else both


@contextmanager
def _all_digits() -> Iterator[None]:
    """Within: CUDA devices round no float32 to the ten binary digits of TF32."""
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    places: tuple[Any, ...] = (cudnn, products)
    name = "allow_tf32"
    exact: bool | str = False
    if hasattr(cudnn, "conv"):  # torch 2.9, which refuses to tell in the old way what is set so
        places, name, exact = (cudnn.conv, cudnn.rnn, products), "fp32_precision", "ieee"
    before = [getattr(place, name) for place in places]
    try:
        for place in places:
            setattr(place, name, exact)
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            setattr(place, name, value)
