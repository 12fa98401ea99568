"""CRAFT, which finds text: a VGG-16 with a decoder, judged by agreement with itself."""

import sys
from pathlib import Path

from rankfold.distances import SquaredError
from suite.case import Case

sys.path.append(str(Path(__file__).parents[3] / "examples"))

SHARES = (0.5, 0.3)


def make() -> Case:
    from ocr_models import make_detector
    from rendered_text import page_batches, split_fonts
    from text_detector import overlap, text_regions

    fonts, held_out = split_fonts()
    model, test = make_detector(), page_batches(8, held_out, seed=1)
    pages = page_batches(32, fonts, seed=0)
    found = [text_regions(model, one) for one in test]
    return Case(
        "CRAFT",
        "text regions as found by the dense network, %",
        make_detector,
        [pages[0][:1], *pages[:5]],
        pages,
        lambda small: overlap([text_regions(small.eval(), one) for one in test], found),
        SquaredError(),
        epochs=1,
        learning_rate=3e-4,
        point=0.05,
    )
