"""Torchvision where its compiled part, which goes with one build of torch alone, is not loaded."""

import sys
from importlib import import_module

import torch

OPERATORS = {
    "torchvision::nms": "(Tensor boxes, Tensor scores, float threshold) -> Tensor",
    "torchvision::qnms": "(Tensor boxes, Tensor scores, float threshold) -> Tensor",
}


def make_importable() -> None:
    """Declare the operators of detectors that torchvision wants to be there; they do nothing."""
    try:
        import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name, schema in OPERATORS.items():
            torch.library.define(name, schema)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]  # half imported
