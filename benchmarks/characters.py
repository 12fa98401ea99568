"""Characters A-Z and 0-9 in many fonts, and the network that reads them in the papers.

The network is that of Jaderberg, Vedaldi, Zisserman (BMVC 2014) and of Lebedev et al. (ICLR 2015):
four convolutions with maxout on grey pictures of 24x24, letter case aside, 36 classes. Its data are
rendered here in the fonts of this machine (see the README for packages), trained on two thirds of
the families and tested on the others. Pictures and weights are made once and kept; a training that
was interrupted goes on where it was.

    python benchmarks/characters.py
"""

import random
import string
import sys
from collections import OrderedDict
from functools import cache, reduce
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import rankfold
from rankfold.measure import accuracy

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from rendered_text import split_fonts

CACHE = Path(__file__).parent / "cache"
WEIGHTS = CACHE / "characters.safetensors"
CLASSES = string.ascii_uppercase + string.digits
DRAWN = string.ascii_letters + string.digits
SIDE = 24  # of a picture
CANVAS = 3 * SIDE  # on which a character is drawn
TRAINING, TEST = 48_000, 7_200
EPOCHS = 3

__all__ = ["accuracy", "make_data", "make_model", "make_test", "make_training"]


class Maxout(nn.Module):
    """The greatest of several pieces of the channels: (n, pieces * c, h, w) to (n, c, h, w)."""

    def __init__(self, pieces: int) -> None:
        super().__init__()
        self.pieces = pieces

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return reduce(torch.maximum, features.chunk(self.pieces, dim=1))

    def extra_repr(self) -> str:
        return str(self.pieces)


def character_network() -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 96, 9),
            maxout1=Maxout(2),
            conv2=nn.Conv2d(48, 128, 9),
            maxout2=Maxout(2),
            conv3=nn.Conv2d(64, 512, 8),
            maxout3=Maxout(4),
            conv4=nn.Conv2d(128, 144, 1),
            maxout4=Maxout(4),
            flatten=nn.Flatten(),
        )
    )


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = character_network()
    if not WEIGHTS.exists():
        train(model)
        save_file(model.state_dict(), WEIGHTS)
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


def train(model: nn.Sequential) -> None:
    """With dropout, and with batch norm that is folded into the convolutions afterwards."""
    convolutions = {name: m for name, m in model.named_children() if isinstance(m, nn.Conv2d)}
    for name, layer in convolutions.items():
        nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
        setattr(model, name, nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels)))
    model.maxout3 = nn.Sequential(model.maxout3, nn.Dropout())
    checkpoint = CACHE / "characters.training.pt"
    done = rankfold.recover(
        model,
        make_training(),
        loss_fn=nn.functional.cross_entropy,
        epochs=EPOCHS,
        learning_rate=2e-3,
        checkpoint=checkpoint,
    )
    print(f"trained: {done.ended}; {done.epochs}", flush=True)
    model.eval()
    for name in convolutions:
        setattr(model, name, fuse_conv_bn_eval(*model.get_submodule(name)))
    model.maxout3 = model.maxout3[0]
    checkpoint.unlink()


def make_training() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pictures in the fonts to train with, and their labels, in batches of 64."""
    return batches_of(*pictures("training", TRAINING), 64)


def make_data() -> list[torch.Tensor]:
    """The first 2 048 of the pictures to train with, in batches of 32, to calibrate on."""
    return list(normalised(pictures("training", TRAINING)[0][:2048]).split(32))


def make_test() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pictures in the families held out, and their labels."""
    return batches_of(*pictures("test", TEST), 240)


def batches_of(
    images: np.ndarray, labels: np.ndarray, size: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    classes = torch.from_numpy(labels).long()
    return list(zip(normalised(images).split(size), classes.split(size), strict=True))


def normalised(images: np.ndarray) -> torch.Tensor:
    """Grey levels (n, side, side) to (n, 1, side, side), each picture of mean 0 and variance 1."""
    pixels = torch.from_numpy(images)[:, None].float()
    deviation, mean = torch.std_mean(pixels, dim=(1, 2, 3), keepdim=True)
    return (pixels - mean) / (deviation + 1)


@cache
def pictures(part: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Grey levels (count, side, side) and classes (count,); rendered once and kept."""
    path = CACHE / f"characters-{part}.npz"
    if not path.exists():
        training, held_out = split_fonts()
        CACHE.mkdir(exist_ok=True)
        images, labels = render(count, training if part == "training" else held_out, part)
        np.savez(path, images=images, labels=labels)
    with np.load(path) as kept:
        return kept["images"], kept["labels"]


def render(count: int, fonts: list[list[Path]], seed: str) -> tuple[np.ndarray, np.ndarray]:
    """As many characters of each class, in families, faces and cases drawn at random."""
    rng = random.Random(seed)
    labels = np.arange(count, dtype=np.int64) % len(CLASSES)
    rng.shuffle(labels)
    images = np.empty((count, SIDE, SIDE), dtype=np.uint8)
    for index, label in enumerate(labels):
        character = rng.choice((CLASSES[label], CLASSES[label].lower()))
        images[index] = render_character(character, rng.choice(rng.choice(fonts)), rng)
    return images, labels


def render_character(character: str, font: Path, rng: random.Random) -> np.ndarray:
    """A grey picture (side, side): turned, of any size, place and contrast, blurred and noisy."""
    face = typeface(font)
    left, top, right, bottom = face.getbbox(character)
    paper, ink = rng.randint(0, 255), rng.randint(0, 255)
    while abs(paper - ink) < 60:
        paper, ink = rng.randint(0, 255), rng.randint(0, 255)
    width, height = right - left, bottom - top
    glyph = Image.new("L", (width, height), 0)
    ImageDraw.Draw(glyph).text((-left, -top), character, fill=255, font=face)
    scale = rng.uniform(0.5, 0.95) * CANVAS / max(width, height)
    stretch = rng.uniform(0.8, 1.25) ** 0.5
    size = (max(3, round(width * scale * stretch)), max(3, round(height * scale / stretch)))
    glyph = glyph.resize(size, Image.Resampling.BILINEAR)
    glyph = glyph.rotate(rng.gauss(0, 8), Image.Resampling.BILINEAR, expand=True)
    canvas = Image.new("L", (CANVAS, CANVAS), paper)
    place = [(CANVAS - side) // 2 + round(rng.uniform(-7, 7)) for side in glyph.size]
    canvas.paste(ink, (place[0], place[1]), glyph)
    canvas = canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0, 3)))
    pixels = np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32)
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(0, 20), pixels.shape)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


@cache
def typeface(font: Path) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(font), 60)


def main(threads: Annotated[int, typer.Option(help="of the training")] = 2) -> None:
    torch.set_num_threads(threads)
    print(f"accuracy in fonts held out: {accuracy(make_model(), make_test()):.2%}")


if __name__ == "__main__":
    typer.run(main)
