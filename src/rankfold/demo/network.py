"""The demonstration network: a small VGG (Simonyan and Zisserman 2015) for 28x28 grey images."""

import torch
from torch import nn


class SmallVGG(nn.Module):
    """Six 3x3 convolutions with batch norm in three pooled stages, then two linear layers.

    Input (batch, 1, 28, 28), values in [0, 1]; output (batch, 10) logits. 1.44 million parameters,
    116 million MACs per image, 99.7 % of them in the convolutions.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        channels = 1
        for stage_width in (width, 2 * width, 4 * width):
            for _ in range(2):
                stages.append(nn.Conv2d(channels, stage_width, 3, padding=1, bias=False))
                stages.append(nn.BatchNorm2d(stage_width))
                stages.append(nn.ReLU(inplace=True))
                channels = stage_width
            stages.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*stages)
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels * 3 * 3, 128),
            nn.ReLU(inplace=True),
            nn.Dropout(0.3),
            nn.Linear(128, 10),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(images))
