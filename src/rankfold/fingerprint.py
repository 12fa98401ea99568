"""Telling one set of weights from another."""

import hashlib
from typing import Any

import torch
from torch import nn


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 of names, dtypes, shapes and values of the state dict."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        add_to(digest, name, value)
    return digest.hexdigest()


def add_to(digest: "hashlib._Hash", name: str, value: Any) -> None:
    """One entry of a state dict."""
    digest.update(f"{name} {getattr(value, 'dtype', '')} {getattr(value, 'shape', '')}".encode())
    digest.update(_raw(value))


def _raw(value: Any) -> bytes:
    if not isinstance(value, torch.Tensor):
        return repr(value).encode()
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
