"""What a network gives, and whether another that should give the same does."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rankfold.batches import Forward, device_of, run_or_explain, running, tensors_of
from rankfold.errors import ModelError

_ROUNDING = 1e-14  # of a squared norm, in float32


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


def references(squared_norms: Sequence[float]) -> list[float]:
    """What the squared error of each tensor of an output is relative to: its own squared norm.

    So each counts alike, whatever its unit. One that is zero, or no more than rounding of the
    others, is compared with all of them together; all are 0 where all tensors are zero.
    """
    whole = sum(squared_norms)
    return [own if own > _ROUNDING * whole else whole for own in squared_norms]


def check_same(before: Any, after: Any, exponent: float, otherwise: str) -> None:
    """Raise ModelError with the message `otherwise` unless nested outputs are the same to rounding.

    The norm of the difference may be as much of the norm of the first as the machine epsilon of its
    dtype, to the power of the `exponent`. NaN and infinity are the same in the same place.
    """
    for one, other in zip(tensors_of(before), tensors_of(after), strict=True):
        if one.shape != other.shape:
            raise ModelError(otherwise)
        same = (one == other) | (one.isnan() & other.isnan())
        difference = torch.where(same, 0, one.double() - other.double()).norm()
        norm = one.double().nan_to_num(0, 0, 0).norm()
        # Not "greater than": NaN is neither.
        if not difference <= torch.finfo(one.dtype).eps ** exponent * norm:
            raise ModelError(otherwise)


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
