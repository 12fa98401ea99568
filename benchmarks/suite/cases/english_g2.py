"""EasyOCR's `english_g2`, a reader of words: convolutions, LSTMs, linear layers."""

import sys
from pathlib import Path

import torch

from rankfold.distances import Transcription
from suite.case import Case

sys.path.append(str(Path(__file__).parents[3] / "examples"))

SHARES = (0.5, 0.35)
TIMES = (0.85, 0.75, 0.6)


def make() -> Case:
    from ocr_models import decode, make_recogniser
    from rendered_text import split_fonts, word_batches
    from scene_text import words_right

    fonts, held_out = split_fonts()
    words = [images for images, _ in word_batches(320, fonts, seed=0)]
    middle = sorted(words, key=lambda images: images.shape[-1])[len(words) // 2]
    test = word_batches(500, held_out, seed=1)
    model = make_recogniser()
    others = [images for images, _ in word_batches(200, fonts, seed=3)]
    with torch.no_grad():
        read = [(images, decode(model(images))) for images in others]
    return Case(
        "english_g2",
        "words right, %",
        make_recogniser,
        [middle[:1], *words],
        [images for images, _ in word_batches(800, fonts, seed=2)],
        lambda model: words_right(model.eval(), test),
        Transcription(),
        epochs=1,
        learning_rate=3e-4,
        validation=read,
        agreement=words_right,
    )
