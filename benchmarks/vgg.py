"""Claims of Zhang et al. 2016 and Denton et al. 2014 on the VGG-16 of a text detector, CRAFT.

Writes benchmarks/vgg.json and tables of docs/reproductions.md, in steps: `fit` makes and scores the
networks, `time` measures them beside the dense one, by their shapes alone, `document` writes. What
is there already is made again unless --reuse. No labels are used: what counts is how well text
regions and boxes agree with those of the dense network, on pages in fonts held out. See the README
for the fonts that this needs.

    python benchmarks/vgg.py
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from paired import (
    Choices,
    choices_of,
    factorized,
    of_these_shapes,
    paired_times,
    restricted,
    share_of_macs,
)
from race import between_markers, machine, markdown_table, save
from scipy import ndimage
from torch import nn

import rankfold
from rankfold.analysis import Analysis
from rankfold.analysis.planning import Objective
from rankfold.methods import DEFAULT_METHODS
from rankfold.refit import refit

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from ocr_models import make_detector
from rendered_text import page_batches, split_fonts
from text_detector import TEXT_THRESHOLD

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "reproductions.md"
VGG = "basenet"
KEPT = 0.25  # of the MACs of the VGG-16
FIRST = "basenet.slice1.0"  # the first layer, of three colours
COLOURS = (8, 16, 32)
STEPS = ["fit", "time", "document"]
SIZE = (2, 3, 256, 320)
SMALLEST_BOX = 10  # pixels
CALIBRATION, TEST = 10, 16  # pages


@dataclass(frozen=True)
class Contender:
    """How the VGG-16 is brought to a quarter of its MACs."""

    methods: Sequence[str]
    objective: Objective


CONTENDERS = {
    "two layers (`svd`), product of energies": Contender(["svd"], "product"),
    "asymmetric 3d (`separable3`), product of energies": Contender(["separable3"], "product"),
    "default methods, sum of losses": Contender(DEFAULT_METHODS, "sum"),
}


@cache
def model() -> nn.Module:
    return make_detector()


@cache
def pages(part: str) -> list[torch.Tensor]:
    fonts, held_out = split_fonts()
    if part == "test":
        return page_batches(TEST, held_out, seed=1)
    return page_batches(CALIBRATION, fonts, seed=0)


def maps(network: nn.Module) -> np.ndarray:
    """Where there is text, and where there are links, on the test pages: (pages, h, w, 2)."""
    with torch.no_grad():
        return np.concatenate([network(b)[0].numpy() > TEXT_THRESHOLD for b in pages("test")])


@cache
def dense_maps() -> np.ndarray:
    return maps(model())


def scores(network: nn.Module) -> tuple[float, float]:
    """Intersection over union of the text regions, F1 of the boxes."""
    ours, theirs = maps(network), dense_maps()
    text, dense_text = ours[..., 0], theirs[..., 0]
    pairs = found = 0
    for page, dense_page in zip(ours, theirs, strict=True):
        both = boxes(page), boxes(dense_page)
        pairs += matching(*both)
        found += sum(map(len, both))
    return float((text & dense_text).sum() / (text | dense_text).sum()), 2 * pairs / found


def boxes(page: np.ndarray) -> np.ndarray:
    """Boxes (n, 4), rows and columns, of what text and links connect."""
    areas, _ = ndimage.label(page.any(-1))
    found = [(r.start, r.stop, c.start, c.stop) for r, c in ndimage.find_objects(areas)]
    large = [b for b in found if (b[1] - b[0]) * (b[3] - b[2]) >= SMALLEST_BOX]
    return np.array(large, dtype=float).reshape(-1, 4)


def matching(ours: np.ndarray, theirs: np.ndarray) -> int:
    """Pairs of boxes of two lists whose intersection is more than half of their union."""
    first, second = ours[:, None], theirs[None]
    height = np.minimum(first[..., 1], second[..., 1]) - np.maximum(first[..., 0], second[..., 0])
    width = np.minimum(first[..., 3], second[..., 3]) - np.maximum(first[..., 2], second[..., 2])
    both = height.clip(0) * width.clip(0)
    areas = [(b[..., 1] - b[..., 0]) * (b[..., 3] - b[..., 2]) for b in (first, second)]
    alike = both > 0.5 * (areas[0] + areas[1] - both)
    return int(min(alike.any(0).sum(), alike.any(1).sum()))


@cache
def analysis() -> Analysis:
    """Of the VGG-16, in the metric of weights: the responses come in when factors are refitted."""
    methods = [*DEFAULT_METHODS, "separable3"]
    return rankfold.analyze(
        model(), pages("calibration")[:1], layers=f"{VGG}.*", methods=methods, metric="weight"
    )


def zhang() -> Iterator[tuple[str, Choices]]:
    able = sum(layer.macs for layer in analysis().layers if layer.name.startswith(VGG))
    budget = 1 - (1 - KEPT) * able / analysis().macs
    for name, contender in CONTENDERS.items():
        found = restricted(analysis(), contender.methods)
        yield name, choices_of(found.plan(macs=budget, objective=contender.objective))


def denton() -> Iterator[tuple[str, Choices]]:
    for colours in COLOURS:
        yield f"`monochromatic`, {colours} colours", {FIRST: ("monochromatic", (colours,))}


def fit(choices: Choices, refitted: bool) -> dict[str, Any]:
    small = factorized(model(), analysis(), choices)
    batch = pages("test")[0]
    row: dict[str, Any] = {
        "choices": choices,
        "macs_kept": share_of_macs(model(), small, batch),
        "part_macs_kept": share_of_macs(*(part(n, choices) for n in (model(), small)), batch),
        "scores": {"factorized": scores(small)},
    }
    print(json.dumps(row), flush=True)
    if not refitted:
        return row
    start = time.perf_counter()
    refit(small, model(), pages("calibration"), list(choices), through_relu=True)
    row["refit_seconds"] = time.perf_counter() - start
    row["scores"]["refitted through ReLU"] = scores(small)
    print(row["scores"], flush=True)
    return row


def part(network: nn.Module, choices: Choices) -> nn.Module:
    """What a claim is about: the first layer or the VGG-16."""
    return network.get_submodule(FIRST if list(choices) == [FIRST] else VGG)


def measure_times(choices: Choices) -> dict[str, tuple[float, float]]:
    """Milliseconds, dense and factorized, of the part that a claim is about and of the detector."""
    small, batch = of_these_shapes(model(), choices), torch.randn(SIZE)
    times = {"part": paired_times(part(model(), choices), part(small, choices), batch)}
    if list(choices) != [FIRST]:  # which is too small a part to be seen
        times["detector"] = paired_times(model(), small, batch)
    return times


def main(
    step: Annotated[list[str] | None, typer.Option(help=f"{', '.join(STEPS)}; or all")] = None,
    threads: int = 2,
    reuse: bool = False,
    out: Path = HERE / "vgg.json",
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    facts = json.loads(out.read_text()) if out.exists() else {"zhang": {}, "denton": {}}
    steps = step or STEPS
    if "fit" in steps:
        for rows, claim in ((facts["zhang"], zhang), (facts["denton"], denton)):
            for name, choices in claim():
                if not (reuse and name in rows):
                    rows[name] = fit(choices, refitted=claim is zhang)
                    save(out, facts)
    if "time" in steps:
        facts["machine"] = machine()
        for row in (*facts["zhang"].values(), *facts["denton"].values()):
            if not (reuse and "milliseconds" in row):
                row["milliseconds"] = measure_times(row["choices"])
                print(row["milliseconds"], flush=True)
                save(out, facts)
    if "document" in steps:
        write_document(facts)


def write_document(facts: dict[str, Any]) -> None:
    on = ", ".join(f"{name} {value}" for name, value in facts["machine"].items())
    states = ("factorized", "refitted through ReLU")
    for name, said, whole, columns in (
        ("zhang", "VGG-16", ["detector"], states),
        ("denton", "first layer", [], states[:1]),
    ):
        times = [f"{one}, speed-up" for one in (said, *whole)]
        header = ("", f"MACs of the {said} kept", *times, *columns)
        lines = [(label, *_cells(row, len(times), columns)) for label, row in facts[name].items()]
        table = markdown_table(header, lines)
        between_markers(DOCUMENT, name, f"{table}\nMeasured on: {on}.\n")


def _cells(row: dict[str, Any], times: int, columns: Sequence[str]) -> tuple[str, ...]:
    timed = row.get("milliseconds", {})
    ordered = [timed[which] for which in ("part", "detector") if which in timed]
    found = [row["scores"][column] for column in columns]
    return (
        f"{row['part_macs_kept']:.0%}",
        *([f"{before / after:.1f}x" for before, after in ordered] or ["not timed"] * times),
        *(f"{100 * regions:.1f} / {100 * f1:.1f}" for regions, f1 in found),
    )


if __name__ == "__main__":
    typer.run(main)
