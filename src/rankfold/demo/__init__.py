"""The embedded demonstration: a trained network and images that ship with the package.

`make_model`, `make_data`, `make_test` and `accuracy` are what a user would write for a network of
their own: `rankfold compress rankfold.demo:make_model --data rankfold.demo:make_data ...`.

The images are of Fashion-MNIST (Xiao, Rasul, Vollgraf 2017; MIT licence, see
LICENSE-fashion-mnist). Those of `make_data` were kept out of training and come without labels.
"""

from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from rankfold.demo.network import SmallVGG
from rankfold.measure import accuracy

BATCH = 32

__all__ = ["accuracy", "make_data", "make_model", "make_test"]


def make_model() -> nn.Module:
    """A small VGG trained on 55 000 images of Fashion-MNIST, in eval mode."""
    network = SmallVGG()
    with as_file(files(__name__) / "small_vgg.safetensors") as path:
        network.load_state_dict(load_file(path))
    return network.eval()


def make_data() -> list[torch.Tensor]:
    """5 000 images without labels, in batches (32, 1, 28, 28)."""
    return list(_images("calibration_images").split(BATCH))


def make_test() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """5 000 held-out test images with their labels, in batches of 32."""
    images, labels = _images("test_images"), torch.from_numpy(_array("test_labels")).long()
    return list(zip(images.split(BATCH), labels.split(BATCH), strict=True))


def _array(name: str) -> np.ndarray:
    with as_file(files(__name__) / "fashion_mnist.npz") as path:
        return np.load(Path(path))[name]


def _images(name: str) -> torch.Tensor:
    return torch.from_numpy(_array(name))[:, None].float() / 255
