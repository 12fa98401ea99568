"""Classifiers, detectors and segmenters of torchvision and timm, where they are installed."""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import nn

from architectures.architecture import Architecture, images

TORCHVISION = (
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "resnet18",
    "resnet50",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
    "vit_b_16",
)
TIMM = (
    "convnext_atto",
    "deit_tiny_patch16_224",
    "edgenext_xx_small",
    "efficientnet_lite0",
    "ghostnet_050",
    "mixer_s32_224",
    "resnet18",
    "swin_tiny_patch4_window7_224",
)


# Torchvision wants them to be there, but its compiled part goes with one build of torch alone.
OPERATORS = {
    "torchvision::nms": "(Tensor boxes, Tensor scores, float threshold) -> Tensor",
    "torchvision::qnms": "(Tensor boxes, Tensor scores, float threshold) -> Tensor",
}


def _imported(package: str) -> ModuleType:
    """The package, also where torchvision's own operators, of detectors, cannot be loaded."""
    try:
        return import_module(package)
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name, schema in OPERATORS.items():
        torch.library.define(name, schema)
    for name in [name for name in sys.modules if name.partition(".")[0] in {"torchvision", "timm"}]:
        del sys.modules[name]
    return import_module(package)


def _of_torchvision(name: str) -> Any:
    def build() -> nn.Module:
        return _imported("torchvision").models.get_model(name, weights=None)

    return build


def _of_timm(name: str) -> Any:
    def build() -> nn.Module:
        return _imported("timm").create_model(name, pretrained=False)

    return build


ARCHITECTURES = (
    *(
        Architecture(
            f"torchvision {name}",
            _of_torchvision(name),
            images(224, samples=2),
            package="torchvision",
        )
        for name in TORCHVISION
    ),
    *(
        Architecture(f"timm {name}", _of_timm(name), images(224, samples=2), package="timm")
        for name in TIMM
    ),
)
