"""Small networks that the tests share, importable by path as a user's would be."""

import torch
from torch import nn


class SmallConvolutional(nn.Module):
    """Convolution, batch norm, convolution of stride 2, linear head: trains in no time."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.body = nn.Conv2d(32, 48, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(48, 48, 3, padding=1, groups=48)
        self.head = nn.Linear(48 * 16, 64)
        self.out = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu_(self.norm(self.stem(images)))
        hidden = torch.relu_(self.depthwise(self.body(hidden)))
        return self.out(torch.relu(self.head(hidden.flatten(1))))


def make_model() -> nn.Module:
    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    model = SmallConvolutional().eval()
    torch.set_rng_state(generator_state)
    return model


def make_data() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randn(96, 3, 8, 8, generator=generator).split(8))


def make_labelled() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The images of `make_data` with the classes that the model itself gives them."""
    model = make_model()
    with torch.no_grad():
        return [(images, model(images).argmax(1)) for images in make_data()]


def make_perceptron() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 8)]
    return nn.Sequential(*layers).eval()


def make_vectors() -> list[torch.Tensor]:
    return list(torch.randn(64, 32, generator=torch.Generator().manual_seed(1)).split(4))


def make_nothing() -> list[torch.Tensor]:
    return []


def make_wrong_shape() -> list[torch.Tensor]:
    return [torch.randn(2, 5, 8, 8)]


def make_nan() -> list[torch.Tensor]:
    return [torch.full((2, 3, 8, 8), torch.nan)]


def fail() -> nn.Module:
    raise OSError("no weights here")


def not_a_model() -> int:
    return 3
