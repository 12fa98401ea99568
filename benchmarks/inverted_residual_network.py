"""A network of 1x1 convolutions, trained on Fashion-MNIST once and kept for later runs.

The inverted residuals of MobileNetV2 (Sandler et al. 2018) for images of 28x28: nine tenths of the
MACs are in 1x1 convolutions. `make_model` is what the command line takes:
inverted_residual_network:make_model; data and metric are those of fashion_mnist.
"""

from pathlib import Path

import torch
from fashion_mnist import HELD_BACK, read
from safetensors.torch import load_file, save_file
from torch import nn

CACHE = Path(__file__).parent / "cache"
WEIGHTS = CACHE / "inverted_residual.safetensors"
UNFINISHED = CACHE / "inverted_residual.training.pt"  # state after the last whole epoch
EPOCHS = 6
BATCH = 128
LEARNING_RATE = 4e-3
# Expansion, output channels, blocks, stride of the first of them.
STAGES = ((1, 24, 1, 2), (6, 24, 1, 1), (6, 48, 3, 2), (6, 96, 3, 2))
STEM, HEAD = 16, 256


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise 3x3, linear 1x1 projection; the input added where shapes agree."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers = normalised(nn.Conv2d(inputs, hidden, 1, bias=False)) if expansion > 1 else []
        depthwise = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        layers += normalised(depthwise)
        layers += normalised(nn.Conv2d(hidden, outputs, 1, bias=False))[:2]
        self.layers = nn.Sequential(*layers)
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found = self.layers(images)
        return images + found if self.is_residual else found


def normalised(convolution: nn.Conv2d) -> list[nn.Module]:
    return [convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU6(inplace=True)]


def inverted_residuals() -> nn.Sequential:
    layers = normalised(nn.Conv2d(1, STEM, 3, padding=1, bias=False))
    channels = STEM
    for expansion, width, blocks, stride in STAGES:
        for block in range(blocks):
            step = stride if block == 0 else 1
            layers.append(InvertedResidual(channels, width, expansion, step))
            channels = width
    layers += normalised(nn.Conv2d(channels, HEAD, 1, bias=False))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(HEAD, 10))


def make_model() -> nn.Module:
    model = inverted_residuals()
    if not WEIGHTS.exists():
        CACHE.mkdir(exist_ok=True)
        train(model)
        save_file(model.state_dict(), WEIGHTS)
        UNFINISHED.unlink()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


def train(model: nn.Module) -> None:
    """All epochs, or those that an interrupted training has not yet done."""
    torch.manual_seed(0)
    model.to(memory_format=torch.channels_last)
    images, labels = (part[:-HELD_BACK] for part in read("train"))
    steps = len(images) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=EPOCHS * steps
    )
    parts = (model, optimizer, schedule)
    done = 0
    if UNFINISHED.exists():
        done, *states = torch.load(UNFINISHED)
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)
    model.train()
    for epoch in range(done, EPOCHS):
        torch.manual_seed(epoch)
        for indices in torch.randperm(len(images)).split(BATCH)[:steps]:
            given = images[indices].to(memory_format=torch.channels_last)
            mirrored = torch.rand(len(given)) < 0.5
            given[mirrored] = given[mirrored].flip(3)
            loss = nn.functional.cross_entropy(model(given), labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        torch.save([epoch + 1, *(part.state_dict() for part in parts)], UNFINISHED)
        print(f"epoch {epoch + 1} of {EPOCHS}: loss {loss:.3f}", flush=True)
