"""An LSTM that tells nine speakers by how they say two vowels: JapaneseVowels, trained in seconds.

Sequences of 7 to 29 frames of 12 numbers, 270 to train on and 370 to test on (Kudo, Toyama,
Shimbo 1999), from the wheel of aeon, read without installing it. Kept once trained.
"""

from collections import defaultdict
from functools import cache
from pathlib import Path

import torch
import wheels
from safetensors.torch import load_file, save_file
from torch import nn

from rankfold.measure import accuracy

WEIGHTS = Path(__file__).parent / "cache" / "japanese_vowels.safetensors"
FRAME, UNITS, SPEAKERS = 12, 128, 9
EPOCHS, RATE = 60, 3e-3

Labelled = list[tuple[torch.Tensor, torch.Tensor]]

__all__ = ["accuracy", "make_data", "make_model", "make_test"]


class Listener(nn.Module):
    """(batch, steps, 12) to the scores of nine speakers, from the last state."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(FRAME, UNITS, batch_first=True)
        self.readout = nn.Linear(UNITS, SPEAKERS)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return self.readout(self.recurrent(frames)[0][:, -1])


def make_model() -> nn.Module:
    model = Listener()
    if not WEIGHTS.exists():
        train(model)
        WEIGHTS.parent.mkdir(exist_ok=True)
        save_file(model.state_dict(), WEIGHTS)
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


def train(model: nn.Module) -> None:
    torch.manual_seed(0)
    batches = read("TRAIN")
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=EPOCHS * len(batches)
    )
    for _ in range(EPOCHS):
        for place in torch.randperm(len(batches)).tolist():
            frames, speakers = batches[place]
            loss = nn.functional.cross_entropy(model(frames), speakers)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()


def make_data() -> list[torch.Tensor]:
    """The sequences of the training, without labels."""
    return [frames for frames, _ in read("TRAIN")]


def make_test() -> Labelled:
    return read("TEST")


@cache
def read(part: str) -> Labelled:
    """Batches of sequences of one length, (batch, steps, 12), with their speakers' numbers."""
    member = f"aeon/datasets/data/JapaneseVowels/JapaneseVowels_{part}.ts"
    by_length = defaultdict(list)
    for line in wheels.read("aeon", "1.6.0", member).decode().splitlines():
        if line and line[0] not in "#@":
            *series, speaker = line.split(":")
            frames = torch.tensor([[float(n) for n in one.split(",")] for one in series]).mT
            by_length[len(frames)].append((frames, int(speaker) - 1))
    return [
        (torch.stack([f for f, _ in alike]), torch.tensor([s for _, s in alike]))
        for _, alike in sorted(by_length.items())
    ]
