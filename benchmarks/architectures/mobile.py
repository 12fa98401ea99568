"""Networks made slim: depthwise convolutions, squeeze-excite, shuffles."""

import torch
from torch import nn

from architectures.architecture import Architecture, images
from architectures.convolutional import classifier


class SqueezeExcite(nn.Module):
    """Hu et al. 2018, with 1x1 convolutions on a single pixel."""

    def __init__(self, width: int, squeezed: int, gate: type[nn.Module]) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(width, squeezed, 1), nn.Conv2d(squeezed, width, 1)
        self.gate = gate()

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        mean = given.mean((2, 3), keepdim=True)
        return given * self.gate(self.expand(torch.relu(self.reduce(mean))))


class InvertedResidual(nn.Module):
    """Sandler et al. 2018 (V2); with squeeze-excite: Howard et al. 2019 (V3)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int = 1,
        size: int = 3,
        activation: type[nn.Module] = nn.ReLU6,
        gate: type[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        width = 4 * inputs
        layers = [nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), activation()]
        depthwise = nn.Conv2d(width, width, size, stride, size // 2, groups=width, bias=False)
        layers += [depthwise, nn.BatchNorm2d(width), activation()]
        if gate is not None:
            layers.append(SqueezeExcite(width, inputs, gate))
        layers += [nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.layers = nn.Sequential(*layers)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return given + self.layers(given) if self.adds else self.layers(given)


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016)."""

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return given
        kept = torch.rand(len(given), 1, 1, 1, device=given.device) < 0.8
        return given * kept / 0.8


class ShuffleUnit(nn.Module):
    """Zhang et al. 2018: grouped 1x1 convolutions, channels shuffled between them."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.first = nn.Conv2d(width, width, 1, groups=groups, bias=False)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.last = nn.Conv2d(width, width, 1, groups=groups, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(3))

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.norms[0](self.first(given)))
        samples, channels, *size = hidden.shape
        hidden = hidden.view(samples, self.groups, channels // self.groups, *size)
        hidden = hidden.transpose(1, 2).reshape(samples, channels, *size)
        hidden = self.norms[1](self.depthwise(hidden))
        return torch.relu(given + self.norms[2](self.last(hidden)))


class Shuffle(nn.Module):
    """Ma et al. 2018: half of the channels pass by (chunk, cat), then `nn.ChannelShuffle`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.body = nn.Sequential(
            nn.Conv2d(half, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(),
            nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False),
            nn.Conv2d(half, half, 1, bias=False),
            nn.BatchNorm2d(half),
        )
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        first, second = given.chunk(2, 1)
        return self.shuffle(torch.cat([first, self.body(second)], 1))


def stem(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width))


def mobilenet_v2() -> nn.Module:
    blocks = (InvertedResidual(24, 24), InvertedResidual(24, 32, 2), InvertedResidual(32, 32))
    return classifier(stem(24), *blocks, nn.Conv2d(32, 128, 1), nn.ReLU6(), width=128)


def mobilenet_v3() -> nn.Module:
    more = {"activation": nn.Hardswish, "gate": nn.Hardsigmoid, "size": 5}
    blocks = (InvertedResidual(24, 24, **more), InvertedResidual(24, 32, 2, **more))
    return classifier(stem(24), nn.Hardswish(), *blocks, nn.Conv2d(32, 128, 1), width=128)


def efficientnet() -> nn.Module:
    """Tan, Le 2019."""
    more = {"activation": nn.SiLU, "gate": nn.Sigmoid}
    blocks = (
        InvertedResidual(24, 24, **more),
        DropPath(),
        InvertedResidual(24, 40, 2, size=5, **more),
        InvertedResidual(40, 40, **more),
        DropPath(),
    )
    return classifier(stem(24), nn.SiLU(), *blocks, nn.Conv2d(40, 160, 1), width=160)


ARCHITECTURES = (
    Architecture("MobileNetV2", mobilenet_v2, images()),
    Architecture("MobileNetV3, squeeze-excite", mobilenet_v3, images()),
    Architecture("EfficientNet, stochastic depth", efficientnet, images()),
    Architecture(
        "ShuffleNet, grouped 1x1",
        lambda: classifier(stem(48), ShuffleUnit(48, 3), ShuffleUnit(48, 3), width=48),
        images(),
    ),
    Architecture(
        "ShuffleNetV2, channel split",
        lambda: classifier(stem(48), Shuffle(48), Shuffle(48), width=48),
        images(),
    ),
)
