"""Detection and segmentation: outputs of several scales, in all kinds of nesting."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from architectures.architecture import Architecture, images, settled
from architectures.convolutional import conv


class Level(NamedTuple):
    scores: torch.Tensor
    boxes: torch.Tensor


@dataclass
class Detections:
    levels: list[Level]
    anchors: dict[str, torch.Tensor]
    stride: int = 8


class Detector(nn.Module):
    """Lin et al. 2017: a pyramid of features; one head, called at every scale."""

    def __init__(self, nesting: str) -> None:
        super().__init__()
        self.nesting = nesting
        self.stages = nn.ModuleList([conv(3, 32, stride=2), conv(32, 48, stride=2)])
        self.stages.append(conv(48, 64, stride=2))
        self.lateral = nn.ModuleDict({f"p{i}": nn.Conv2d(w, 32, 1) for i, w in enumerate((48, 64))})
        self.head = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU())
        self.scores, self.boxes = nn.Conv2d(64, 9, 1), nn.Conv2d(64, 12, 1)
        self.register_buffer("anchors", torch.rand(4, 4))

    def forward(self, given: torch.Tensor) -> Any:
        features = []
        for stage in self.stages:
            given = stage(given)
            features.append(given)
        last = self.lateral["p1"](features[2])
        first = self.lateral["p0"](features[1])
        first = first + functional.interpolate(last, size=first.shape[-2:], mode="nearest")
        levels = []
        for level in (first, last):
            hidden = self.head(level)
            levels.append(Level(self.scores(hidden), self.boxes(hidden)))
        if self.nesting == "list":
            return [list(level) for level in levels]
        if self.nesting == "dict":
            found = {f"scale {i}": level._asdict() for i, level in enumerate(levels)}
            return OrderedDict(found, ids=torch.arange(3), nothing=None)
        return Detections(levels, {"all": self.anchors + 0})


class Segmenter(nn.Module):
    """Chen et al. 2017: dilated convolutions side by side, interpolated to the input's size."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(conv(3, 32, stride=2), conv(32, 64, stride=2))
        self.branches = nn.ModuleList(
            nn.Conv2d(64, 32, 3, padding=d, dilation=d) for d in (1, 2, 3)
        )
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(64, 32, 1), nn.ReLU())
        self.classes = nn.Conv2d(128, 5, 1)

    def forward(self, given: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.backbone(given)
        pooled = self.pooled(features).expand(-1, -1, *features.shape[-2:])
        out = torch.cat([*(branch(features) for branch in self.branches), pooled], 1)
        size = given.shape[-2:]
        return {"out": functional.interpolate(self.classes(out), size, mode="bilinear")}


class UNet(nn.Module):
    """Ronneberger et al. 2015: transposed convolutions, skips; of an odd size, cut and padded."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = conv(3, 24), conv(24, 48), conv(48, 64)
        self.up2, self.up1 = (nn.ConvTranspose2d(w, w // 2, 2, 2) for w in (64, 48))
        self.merge2, self.merge1 = conv(32 + 48, 48), conv(24 + 24, 24)
        self.out = nn.Conv2d(24, 2, 1)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        first = self.down1(given)
        second = self.down2(functional.max_pool2d(first, 2))
        hidden = self.middle(functional.max_pool2d(second, 2))
        for up, merge, skip in (
            (self.up2, self.merge2, second),
            (self.up1, self.merge1, first),
        ):
            hidden = up(hidden)
            missing = [s - h for s, h in zip(skip.shape[-2:], hidden.shape[-2:], strict=True)]
            hidden = functional.pad(hidden, (0, missing[1], 0, missing[0]))
            hidden = merge(torch.cat([skip, hidden], 1))
        return self.out(hidden)


def detector(nesting: str) -> nn.Module:
    return settled(Detector(nesting), torch.randn(8, 3, 32, 32))


ARCHITECTURES = (
    Architecture("Detector, lists of lists", lambda: detector("list"), images()),
    Architecture("Detector, dicts of dicts", lambda: detector("dict"), images()),
    Architecture("Detector, a dataclass of tuples", lambda: detector("dataclass"), images()),
    Architecture(
        "Segmentation, dilated, interpolated",
        lambda: settled(Segmenter(), torch.randn(8, 3, 33, 33)),
        images(33),
    ),
    Architecture("U-Net", lambda: settled(UNet(), torch.randn(8, 3, 30, 30)), images(30)),
)
