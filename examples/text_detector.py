"""Compress the VGG-16 of a pretrained text detector without labels and compare its score maps.

    make examples

CRAFT, the detector of EasyOCR, is a VGG-16 with batch norm under a U-Net head: 20.8 million
parameters. Its answer is two maps, where text is and where letters link; the metric is how well the
small network's map of text agrees with the original's on pages in fonts that recovery did not see:
the intersection over union of the regions above EasyOCR's threshold.
"""

import argparse
import copy
import time
from collections.abc import Sequence

import torch
from ocr_models import make_detector
from rendered_text import page_batches, split_fonts

import rankfold
from rankfold.measure import in_fastest_memory_format

TEXT_THRESHOLD = 0.4  # EasyOCR's low_text: pixels above it make up the boxes


def text_regions(model: torch.nn.Module, pages: torch.Tensor) -> torch.Tensor:
    """Pixels (batch, h/2, w/2) that the model takes for text."""
    with torch.no_grad():
        maps, _ = model(pages)
    return maps[..., 0] > TEXT_THRESHOLD


def overlap(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """Intersection over union of two models' text regions, over all pages."""
    pairs = list(zip(ours, theirs, strict=True))
    return sum(int((a & b).sum()) for a, b in pairs) / sum(int((a | b).sum()) for a, b in pairs)


def agreement(model: torch.nn.Module, teacher: torch.nn.Module, batches: rankfold.Data) -> float:
    """How much two models' text regions overlap, over all pages."""
    return overlap(*([text_regions(one, pages) for pages in batches] for one in (model, teacher)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--macs", type=float, default=0.3, help="fraction of MACs kept")
    parser.add_argument("--pages", type=int, default=24, help="held-out pages to test on")
    parser.add_argument("--recovery-pages", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", default="craft-small")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    model = make_detector()
    fonts, held_out_fonts = split_fonts()
    data = page_batches(options.recovery_pages, fonts, seed=0)
    test = page_batches(options.pages, held_out_fonts, seed=1)

    start = time.perf_counter()
    plan = rankfold.analyze(model, data).plan(macs=options.macs)
    small = rankfold.factorize(model, plan)
    print(f"analyzed, planned and factorized in {time.perf_counter() - start:.1f} s")
    unrecovered = agreement(copy.deepcopy(small).eval(), model, test)
    recovery = rankfold.recover(small, data, teacher=model, epochs=options.epochs)
    print(f"recovered in {recovery.seconds:.0f} s: {recovery.ended}, epoch {recovery.best} is best")
    small = in_fastest_memory_format(small, test[0])
    comparison = rankfold.measure(in_fastest_memory_format(model, test[0]), small, test)
    rankfold.save(small, options.out, force=True)
    loaded = rankfold.load(options.out, make_detector)
    print(comparison)
    print(
        f"agreement of the text regions with the original's: factorized {unrecovered:.1%}, "
        f"recovered {agreement(loaded, model, test):.1%}"
    )


if __name__ == "__main__":
    main()
