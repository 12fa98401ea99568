"""Classifiers, detectors and segmenters of torchvision and timm, where they are installed."""

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
