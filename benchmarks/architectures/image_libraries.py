"""Classifiers of torchvision and timm, where they are installed.

At their own width: with a metric of thousands of inputs each layer would take minutes, so that they
are compressed by their weights, and not recovered.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import nn

from architectures.architecture import Architecture, images
from architectures.torchvision_operators import make_importable

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


def _of_torchvision(name: str) -> Any:
    def build() -> nn.Module:
        make_importable()
        return import_module("torchvision").models.get_model(name, weights=None)

    return build


def _of_timm(name: str) -> Any:
    def build() -> nn.Module:
        make_importable()
        return import_module("timm").create_model(name, pretrained=False)

    return build


def _of_library(package: str, name: str, build: Callable[[], nn.Module]) -> Architecture:
    return Architecture(
        f"{package} {name}",
        build,
        images(224, samples=2),
        package=package,
        metric="weight",
        recovered=False,
    )


ARCHITECTURES = (
    *(_of_library("torchvision", name, _of_torchvision(name)) for name in TORCHVISION),
    *(_of_library("timm", name, _of_timm(name)) for name in TIMM),
)
