"""Networks that make images: generators, critics, super-resolution, diffusion, autoencoders."""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as old_spectral_norm

from architectures.architecture import Architecture, batches, images, noise, settled


def dcgan() -> nn.Module:
    """Radford et al. 2016: a generator of transposed convolutions from a single pixel."""
    layers: list[nn.Module] = [nn.ConvTranspose2d(32, 64, 4, 1, 0, bias=False)]
    for inputs, outputs in ((64, 48), (48, 32)):
        layers += [nn.BatchNorm2d(inputs), nn.ReLU(True)]
        layers.append(nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=False))
    layers += [nn.ReLU(True), nn.ConvTranspose2d(32, 3, 3, 2, 1, output_padding=1), nn.Tanh()]
    return settled(nn.Sequential(*layers), torch.randn(16, 32, 1, 1))


def critic(norm: Any) -> nn.Module:
    """Miyato et al. 2018: every layer's greatest singular value is 1."""
    return nn.Sequential(
        norm(nn.Conv2d(3, 32, 4, 2, 1)),
        nn.LeakyReLU(0.2, True),
        norm(nn.Conv2d(32, 64, 4, 2, 1)),
        nn.LeakyReLU(0.2, True),
        nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect"),
        nn.Flatten(),
        norm(nn.Linear(4096, 16)),
        nn.Linear(16, 1),
    )


class SuperResolution(nn.Module):
    """Shi et al. 2016: channels become pixels; the image interpolated is added."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 48, 5, padding=2), nn.Conv2d(48, 48, 3, padding=1)
        self.last = nn.Conv2d(48, 27, 3, padding="same", padding_mode="replicate")
        self.shuffle = nn.PixelShuffle(3)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.second(torch.tanh(self.first(given))))
        bigger = functional.interpolate(given, scale_factor=3, mode="bicubic")
        return self.shuffle(self.last(hidden)) + bigger


class Autoencoder(nn.Module):
    """Kingma, Welling 2014: a mean and a variance; noise is drawn in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(768, 128), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(128, 16), nn.Linear(128, 16)
        self.decoder = nn.Sequential(
            nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 768), nn.Unflatten(1, (3, 16, 16))
        )

    def forward(self, given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden = self.encoder(given)
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        drawn = torch.randn_like(mean) * (log_variance / 2).exp() if self.training else 0
        return self.decoder(mean + drawn), mean, log_variance


class Quantizing(nn.Module):
    """Oord et al. 2017: the nearest entry of a codebook, gradients passed straight through."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, 48, 4, 4)
        self.codebook = nn.Embedding(64, 48)
        self.decoder = nn.ConvTranspose2d(48, 3, 4, 4)

    def forward(self, given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.encoder(given)
        rows = hidden.permute(0, 2, 3, 1)
        codes = torch.cdist(rows.flatten(0, 2), self.codebook.weight).argmin(1)
        found = self.codebook(codes).view_as(rows).permute(0, 3, 1, 2)
        return self.decoder(hidden + (found - hidden).detach()), codes


class TimedBlock(nn.Module):
    """Ho et al. 2020: group norms, and a linear layer of the time added to the channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, inputs), nn.GroupNorm(4, outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.time = nn.Linear(64, outputs)
        self.short = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, given: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        hidden = self.conv1(functional.silu(self.norm1(given)))
        hidden = hidden + self.time(functional.silu(time))[:, :, None, None]
        return self.conv2(functional.silu(self.norm2(hidden))) + self.short(given)


class PixelAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, width)
        self.qkv, self.proj = nn.Conv1d(width, 3 * width, 1), nn.Conv1d(width, width, 1)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        flat = self.norm(given).flatten(2)
        query, key, value = self.qkv(flat).unflatten(1, (3, 4, -1)).unbind(1)
        weights = torch.einsum("bhcq,bhck->bhqk", query, key).mul(query.shape[2] ** -0.5)
        mixed = torch.einsum("bhqk,bhck->bhcq", weights.softmax(-1), value)
        return given + self.proj(mixed.flatten(1, 2)).view_as(given)


class Diffusion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 64))
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.down, self.middle = TimedBlock(32, 64), TimedBlock(64, 64)
        self.attention = PixelAttention(64)
        self.up, self.last = TimedBlock(96, 32), nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> dict[str, torch.Tensor]:
        frequencies = torch.exp(-math.log(1e4) / 16 * torch.arange(16))
        angles = timestep[:, None].float() * frequencies
        time = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        first = self.first(sample)
        hidden = self.down(functional.avg_pool2d(first, 2), time)
        hidden = self.middle(self.attention(hidden), time)
        hidden = functional.interpolate(hidden, scale_factor=2)
        return {"sample": self.last(self.up(torch.cat([hidden, first], 1), time))}


ARCHITECTURES = (
    Architecture("DCGAN generator", dcgan, noise(4, 32, 1, 1)),
    Architecture(
        "Critic, spectral norm (parametrization)",
        lambda: critic(parametrizations.spectral_norm),
        images(),
    ),
    Architecture("Critic, spectral norm (hook)", lambda: critic(old_spectral_norm), images()),
    Architecture("Super-resolution, PixelShuffle", SuperResolution, images(16)),
    Architecture("Variational autoencoder", Autoencoder, images(16)),
    Architecture("Codebook read by its weight", Quantizing, images(16)),
    Architecture(
        "Diffusion U-Net",
        Diffusion,
        batches(
            lambda: {"sample": torch.randn(2, 3, 16, 16), "timestep": torch.randint(1000, (2,))}
        ),
    ),
)
