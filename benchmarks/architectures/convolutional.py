"""Classifiers of images by plain convolutions, 2014 to 2022."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from architectures.architecture import Architecture, images, settled


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, **more: Any) -> nn.Sequential:
    """Convolution, batch norm, ReLU in place."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False, **more),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class Basic(nn.Module):
    """He et al. 2016: two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        short = given if self.downsample is None else self.downsample(given)
        out = functional.relu(self.bn1(self.conv1(given)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += short
        return functional.relu(out, inplace=True)


class Bottleneck(nn.Module):
    """He et al. 2016; with groups: Xie et al. 2017 (ResNeXt)."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int = 1) -> None:
        super().__init__()
        width = outputs // 2
        self.body = nn.Sequential(
            *conv(inputs, width, 1),
            *conv(width, width, 3, stride, groups=groups),
            nn.Conv2d(width, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.short = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.short = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(given) + self.short(given))


class DenseLayer(nn.Module):
    """Huang et al. 2017: what a layer gives is put behind what it was given."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(4 * growth)
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, given: list[torch.Tensor]) -> torch.Tensor:
        hidden = self.conv1(torch.relu(self.norm1(torch.cat(given, 1))))
        return self.conv2(torch.relu(self.norm2(hidden)))


class DenseBlock(nn.ModuleDict):
    def __init__(self, inputs: int, layers: int, growth: int) -> None:
        super().__init__()
        for index in range(layers):
            self[f"denselayer{index}"] = DenseLayer(inputs + index * growth, growth)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        features = [given]
        for _, layer in self.items():
            features.append(layer(features))
        return torch.cat(features, 1)


class Inception(nn.Module):
    """Szegedy et al. 2015: four branches side by side; of 2016, with 1x7 and 7x1."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.one = conv(inputs, 16, 1)
        self.three = nn.Sequential(conv(inputs, 24, 1), conv(24, 32))
        self.seven = nn.Sequential(
            conv(inputs, 16, 1),
            nn.Conv2d(16, 16, (1, 7), padding=(0, 3)),
            nn.Conv2d(16, 16, (7, 1), padding=(3, 0)),
        )
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(inputs, 16, 1))

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        branches = (self.one, self.three, self.seven, self.pool)
        return torch.cat([branch(given) for branch in branches], 1)


class GoogLeNet(nn.Module):
    """With an auxiliary head that training alone runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 32, stride=2)
        self.first, self.second = Inception(32), Inception(80)
        self.auxiliary = nn.Linear(80, 10)
        self.head = nn.Linear(80, 10)

    def forward(self, given: torch.Tensor) -> Any:
        hidden = self.first(self.stem(given))
        out = self.head(self.second(hidden).mean((2, 3)))
        return (out, self.auxiliary(hidden.mean((2, 3)))) if self.training else out


def without_auxiliary(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """The same in training as otherwise, so that a teacher can be matched."""
    outputs = model(batch)
    return outputs[0] if isinstance(outputs, tuple) else outputs


class ChannelsLastNorm(nn.LayerNorm):
    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return super().forward(given.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """Liu et al. 2022: depthwise 7x7, LayerNorm, two linear layers, a scale for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.pwconv1, self.pwconv2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.dwconv(given).permute(0, 2, 3, 1))
        hidden = self.pwconv2(functional.gelu(self.pwconv1(hidden)))
        return given + (self.gamma * hidden).permute(0, 3, 1, 2)


def classifier(*body: nn.Module, width: int) -> nn.Module:
    network = nn.Sequential(
        *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(width, 10)
    )
    return settled(network, torch.randn(16, 3, 32, 32))


def vgg() -> nn.Module:
    """Simonyan, Zisserman 2015: no norms, a head of three wide linear layers."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 96)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(2)]
    head = [nn.Linear(96 * 16, 128), nn.ReLU(True), nn.Dropout(), nn.Linear(128, 128)]
    return nn.Sequential(*layers, nn.Flatten(), *head, nn.ReLU(True), nn.Linear(128, 10))


def alexnet() -> nn.Module:
    """Krizhevsky et al. 2012: 11x11 of stride 4, two groups, pooling that overlaps."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 11, 4, 2),
        nn.ReLU(inplace=True),
        nn.LocalResponseNorm(5),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(32, 64, 5, padding=2, groups=2),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(1),
        nn.Linear(576, 96),
        nn.ReLU(inplace=True),
        nn.Linear(96, 10),
    )


def residual(block: Any, **more: Any) -> nn.Module:
    shapes = ((32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2))
    return classifier(conv(3, 32), *(block(*shape, **more) for shape in shapes), width=128)


def densenet() -> nn.Module:
    transition = nn.Sequential(nn.BatchNorm2d(80), nn.Conv2d(80, 40, 1), nn.AvgPool2d(2))
    blocks = (DenseBlock(32, 3, 16), transition, DenseBlock(40, 3, 16))
    return classifier(conv(3, 32, stride=2), *blocks, width=88)


def convnext() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 4, 4),
        ChannelsLastNorm(32),
        ConvNeXtBlock(32),
        ChannelsLastNorm(32),
        nn.Conv2d(32, 64, 2, 2),
        ConvNeXtBlock(64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(64),
        nn.Linear(64, 10),
    )


ARCHITECTURES = (
    Architecture("VGG", vgg, images()),
    Architecture("AlexNet", alexnet, images(64)),
    Architecture("ResNet, basic blocks", lambda: residual(Basic), images()),
    Architecture("ResNet, bottlenecks", lambda: residual(Bottleneck), images()),
    Architecture("ResNeXt, groups", lambda: residual(Bottleneck, groups=4), images()),
    Architecture("DenseNet", densenet, images()),
    Architecture(
        "Inception, auxiliary head",
        lambda: settled(GoogLeNet(), torch.randn(16, 3, 32, 32)),
        images(),
        forward=without_auxiliary,
    ),
    Architecture("ConvNeXt blocks", convnext, images()),
)
