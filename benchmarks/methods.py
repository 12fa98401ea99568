"""Every method on the real layers of four networks, at equal MACs: error, speed, time to fit.

Writes benchmarks/methods.json, and a table and a picture for each network of docs/methods.md.
Networks: the demo's, `english_g2`, CREPE, CRAFT (see examples/ and crepe.py for what they need).
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from race import between_markers, machine, markdown_table, save
from torch import nn

import rankfold
from rankfold.analysis import AnalysedLayer
from rankfold.analysis.candidates import below_break_even
from rankfold.analysis.survey import survey
from rankfold.batches import run
from rankfold.cost import count_parameters
from rankfold.measure import latencies, with_memory_format
from rankfold.methods import METHODS, Method, Rank, reduction

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "methods.md"
SHARES = (0.5, 0.25, 0.12)  # of a layer's MACs


def demo() -> tuple[nn.Module, list[torch.Tensor]]:
    from rankfold.demo import make_data, make_model

    return make_model().eval(), [batch[:16] for batch in make_data()]


def english_g2() -> tuple[nn.Module, list[torch.Tensor]]:
    sys.path.append(str(HERE.parent / "examples"))
    from ocr_models import make_recogniser
    from rendered_text import split_fonts, word_batches

    words = [images for images, _ in word_batches(160, split_fonts()[0], seed=0)]
    middle = sorted(words, key=lambda images: images.shape[-1])[len(words) // 2]
    return make_recogniser(), [middle[:1], *words]


def crepe() -> tuple[nn.Module, list[torch.Tensor]]:
    from crepe import make_data, make_model

    return make_model(), make_data()


def craft() -> tuple[nn.Module, list[torch.Tensor]]:
    sys.path.append(str(HERE.parent / "examples"))
    from ocr_models import make_detector
    from rendered_text import page_batches, split_fonts

    return make_detector(), page_batches(16, split_fonts()[0], seed=0)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, list[torch.Tensor]]]] = {
    "demo": demo,
    "english_g2": english_g2,
    "CREPE": crepe,
    "CRAFT": craft,
}


def compare(
    model: nn.Module, data: list[Any], most: int, names: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """One row for each of the convolutions with the most MACs, method and share."""
    analysis = rankfold.analyze(
        model, data, metric="svd-llm", check=False, methods=["svd"], batches=8, held_out=1
    )
    surveyed = {layer.name: layer for layer in survey(model, data, run, 1).layers}
    heavy = sorted(
        (layer for layer in analysis.layers if "Conv" in layer.layer and layer.candidates),
        key=lambda layer: -layer.macs,
    )
    for layer in heavy[:most]:
        module, shapes = surveyed[layer.name].module, surveyed[layer.name].input_shapes
        for name in names:
            method = METHODS[name]()
            if reduction.why_not(method, module) is None:
                yield from try_method(method, layer, module, shapes)


def try_method(
    method: Method,
    layer: AnalysedLayer,
    module: nn.Module,
    shapes: Sequence[tuple[int, ...]],
) -> Iterator[dict[str, Any]]:
    start = time.perf_counter()
    family = reduction.fit(method, module, layer.moments)
    costs = below_break_even(
        module, method, family.ranks(), shapes, (count_parameters(module), layer.macs)
    )
    for share in SHARES:
        affordable = [rank for rank, cost in costs.items() if cost[1] <= share * layer.macs]
        if not affordable:
            continue
        rank: Rank = min(affordable, key=family.loss)
        form = family.build(rank)
        seconds = time.perf_counter() - start
        weight = module.weight.detach()  # type: ignore[union-attr]
        difference = form.to_dense().weight.detach().double() - weight.double()
        whole = layer.moments.squared_error(weight)
        row = {
            "layer": layer.name,
            "repr": layer.layer,
            "method": method.name,
            "share": share,
            "rank": rank,
            "kept": costs[rank][1] / layer.macs,
            "weight_error": (difference.norm() / weight.double().norm()).item(),
            "response_error": (layer.moments.squared_error(difference) / whole) ** 0.5,
            "predicted": family.loss(rank),
            "seconds": seconds,  # of the first share with the fit, of the others what they add
            "speedup": speedup(module, form, shapes[0]),
        }
        print(json.dumps(row), flush=True)
        yield row
        start = time.perf_counter()


def speedup(module: nn.Module, form: nn.Module, shape: tuple[int, ...]) -> float:
    """Of the layer alone, each in the memory format in which it is faster."""
    given = torch.randn(shape)
    layers = [
        (with_memory_format(one, memory_format), memory_format)
        for one in (module, form)
        for memory_format in ("contiguous", "channels_last")
    ]

    def call(layer: nn.Module, memory_format: str) -> Callable[[], Any]:
        last = memory_format == "channels_last" and given.dim() == 4
        ready = given.to(memory_format=torch.channels_last) if last else given
        return lambda: layer(ready)

    with torch.no_grad():
        dense, dense_last, small, small_last = latencies(
            [call(*layer) for layer in layers], torch.device("cpu"), seconds=0.5
        )
    return min(dense, dense_last) / min(small, small_last)


def main(
    only: Annotated[list[str] | None, typer.Option(help="a network; may be repeated")] = None,
    methods: Annotated[list[str] | None, typer.Option(help="names; default: all")] = None,
    most: Annotated[int, typer.Option(help="layers of each network, by MACs")] = 3,
    threads: int = 2,
    out: Path = HERE / "methods.json",
) -> None:
    torch.set_num_threads(threads)
    facts = json.loads(out.read_text()) if out.exists() else {"networks": {}}
    facts["machine"] = machine()
    names = methods or [name for name in METHODS if name != "fewer-units"]
    for network in only or NETWORKS:
        torch.manual_seed(0)
        model, data = NETWORKS[network]()
        facts["networks"][network] = []
        for row in compare(model, data, most, names):
            facts["networks"][network].append(row)
            save(out, facts)
    write_document(facts)


def write_document(facts: dict[str, Any]) -> None:
    on = ", ".join(f"{name} {value}" for name, value in facts["machine"].items())
    for network, rows in facts["networks"].items():
        picture = f"methods-{network}.svg"
        draw(rows, DOCUMENT.parent / picture)
        text = f"{table(rows)}\n![Error against time]({picture})\n\nMeasured on: {on}.\n"
        between_markers(DOCUMENT, network, text)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Medians over layers: response error / speed-up at each share; seconds for the first share."""
    lines = []
    layers = len({row["layer"] for row in rows})
    for name in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for share in SHARES:
            found = [row for row in rows if row["method"] == name and row["share"] == share]
            if len(found) < layers:
                cells.append(f"reached on {len(found)} of {layers}" if found else "")
                continue
            error = median([row["response_error"] for row in found])
            cells.append(f"{error:.3f} / {median([row['speedup'] for row in found]):.1f}x")
        seconds = [row["seconds"] for row in rows if row["method"] == name]
        lines.append((name, *cells, f"{sum(seconds):.1f}"))
    shares = [f"{share:.0%} of MACs" for share in SHARES]
    of = f"median of {layers} layers" if layers > 1 else "one layer"
    title = f"response error / speed-up, {of}"
    return markdown_table((title, *shares, "seconds in all"), lines)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Error against the share of the dense time, a panel for each layer."""
    from matplotlib.figure import Figure

    layers = list(dict.fromkeys(row["layer"] for row in rows))
    figure = Figure(figsize=(5 * len(layers), 4.5), layout="constrained")
    for axes, layer in zip(figure.subplots(1, len(layers), squeeze=False)[0], layers, strict=True):
        for index, name in enumerate(dict.fromkeys(row["method"] for row in rows)):
            points = [row for row in rows if row["layer"] == layer and row["method"] == name]
            style = ("o-", "s--", "^:")[index // 10 % 3]
            axes.semilogy(
                [1 / row["speedup"] for row in points],
                [row["response_error"] for row in points],
                style,
                label=name,
            )
        axes.set(title=layer, xlabel="time, share of the dense layer's", ylabel="response error")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path)


if __name__ == "__main__":
    typer.run(main)
