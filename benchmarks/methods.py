"""Every method on the real layers of four networks, at equal MACs: error, speed, time to fit.

Writes benchmarks/methods.json, and a table and a picture for each network of docs/methods.md.
Networks: the demo's, `english_g2`, CREPE, CRAFT (see examples/ and crepe.py for what they need).
"""

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from race import between_markers, machine, markdown_table, save
from torch import nn

import rankfold
from rankfold.analysis import AnalysedLayer
from rankfold.analysis.alone import filled
from rankfold.analysis.candidates import below_break_even
from rankfold.analysis.survey import survey
from rankfold.batches import run
from rankfold.cost import count_parameters
from rankfold.measure import latencies, with_memory_format
from rankfold.methods import METHODS, Method, Rank, reduction

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "methods.md"
SHARES = (0.5, 0.25, 0.12)  # of a layer's MACs
TIME_SHARES = (0.5, 0.25)  # of its time
WHOLE, WHOLE_SHARE = "english_g2", 0.25  # the network all of whose convolutions are fitted


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


class OutOfPatienceError(Exception):
    """Something takes longer than it may."""


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Within: OutOfPatienceError after so many seconds."""

    def give_up(*_: Any) -> None:
        raise OutOfPatienceError

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def compare(
    model: nn.Module, data: list[Any], most: int, names: Sequence[str], patience: int
) -> Iterator[dict[str, Any]]:
    """One row for each of the convolutions with the most MACs, method and share.

    A method whose fit takes more than `patience` seconds is given up, with a row that says so.
    """
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
        track = Track(module, shapes[0])
        for name in names:
            method = METHODS[name]()
            if reduction.why_not(method, module) is not None:
                continue
            try:
                yield from try_method(method, layer, module, shapes, track, patience)
            except OutOfPatienceError:
                row = {"layer": layer.name, "method": name, "gave_up_after": patience}
                print(json.dumps(row), flush=True)
                yield row


def fit_all(model: nn.Module, data: list[Any], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The seconds in which each method fits all the convolutions that it takes, at one share."""
    analysis = rankfold.analyze(
        model, data, metric="svd-llm", check=False, methods=["svd"], batches=8, held_out=1
    )
    surveyed = {layer.name: layer for layer in survey(model, data, run, 1).layers}
    for name in names:
        method, seconds, layers = METHODS[name](), 0.0, 0
        for layer in analysis.layers:
            module, shapes = surveyed[layer.name].module, surveyed[layer.name].input_shapes
            if "Conv" not in layer.layer or reduction.why_not(method, module) is not None:
                continue
            start = time.perf_counter()
            family = reduction.fit(method, module, layer.moments)
            dense = count_parameters(module), layer.macs
            costs = below_break_even(module, method, family.ranks(), shapes, dense)
            front = best_by_macs(costs, family.loss)
            if front:
                family.build(within(front, costs, WHOLE_SHARE * layer.macs) or front[0])
            seconds += time.perf_counter() - start
            layers += 1
        row = {"method": name, "layers": layers, "seconds": seconds}
        print(json.dumps(row), flush=True)
        yield row


class Track:
    """Where forms of one layer run against it, each in the memory format in which it is faster."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        self.layer = layer
        given = torch.randn(shape)
        self.inputs = (
            [given, given.to(memory_format=torch.channels_last)] if given.dim() == 4 else [given]
        )
        times = self._race(self._calls(layer), 0.5)
        self.dense = self._calls(layer)[times.index(min(times))]

    def share_of_time(self, form: nn.Module, seconds: float = 0.5) -> float:
        """Of the dense layer's."""
        dense, *small = self._race([self.dense, *self._calls(form)], seconds)
        return min(small) / dense

    def _calls(self, layer: nn.Module) -> list[Callable[[], Any]]:
        formats = ("contiguous", "channels_last")[: len(self.inputs)]
        layers = [with_memory_format(layer, one) for one in formats]
        return [partial(one, ready) for one, ready in zip(layers, self.inputs, strict=True)]

    def _race(self, calls: list[Callable[[], Any]], seconds: float) -> list[float]:
        with torch.no_grad():
            return latencies(calls, torch.device("cpu"), seconds=seconds)


def try_method(
    method: Method,
    layer: AnalysedLayer,
    module: nn.Module,
    shapes: Sequence[tuple[int, ...]],
    track: Track,
    patience: int,
) -> Iterator[dict[str, Any]]:
    """At shares of the layer's MACs, then at shares of its time."""
    start = time.perf_counter()
    with at_most(patience):
        family = reduction.fit(method, module, layer.moments)
        costs = below_break_even(
            module, method, family.ranks(), shapes, (count_parameters(module), layer.macs)
        )
        front = best_by_macs(costs, family.loss)
    whole = layer.moments.squared_error(module.weight.detach())  # type: ignore[arg-type, union-attr, operator]
    chosen = [("macs", share, within(front, costs, share * layer.macs)) for share in SHARES]
    chosen += [("time", share, None) for share in TIME_SHARES]
    for kind, share, rank in chosen:
        if kind == "time":
            rank = fastest_within(method, module, front, share, track)
            start = time.perf_counter()  # the search is not the method's
        if rank is None:
            continue
        with at_most(patience):
            form = family.build(rank)
        seconds = time.perf_counter() - start
        weight = module.weight.detach()  # type: ignore[union-attr, operator]
        difference = form.to_dense().weight.detach().double() - weight.double()
        row = {
            "layer": layer.name,
            "repr": layer.layer,
            "method": method.name,
            "of": kind,
            "share": share,
            "rank": rank,
            "kept": costs[rank][1] / layer.macs,
            "weight_error": (difference.norm() / weight.double().norm()).item(),
            "response_error": (layer.moments.squared_error(difference) / whole) ** 0.5,
            "predicted": family.loss(rank),
            "seconds": seconds,  # of the first share with the fit, of the others what they add
            "speedup": 1 / track.share_of_time(form),
        }
        print(json.dumps(row), flush=True)
        yield row
        start = time.perf_counter()


def best_by_macs(costs: dict[Rank, tuple[int, int]], loss: Callable[[Rank], float]) -> list[Rank]:
    """The ranks than which none is both cheaper and better, the cheapest first."""
    front: list[Rank] = []
    for rank in sorted(costs, key=lambda one: (costs[one][1], loss(one))):
        if not front or loss(rank) < loss(front[-1]):
            front.append(rank)
    return front


def within(front: list[Rank], costs: dict[Rank, tuple[int, int]], macs: float) -> Rank | None:
    affordable = [rank for rank in front if costs[rank][1] <= macs]
    return affordable[-1] if affordable else None


def fastest_within(
    method: Method, module: nn.Module, front: list[Rank], share: float, track: Track
) -> Rank | None:
    """The last of the front that takes no more than this share of the dense layer's time.

    By bisection, as if time grew along it; forms are timed with any weights.
    """
    slow, fast = len(front), -1
    while slow - fast > 1:
        middle = (slow + fast) // 2
        form = filled(reduction.skeleton(method, module, front[middle]), torch.device("cpu"))
        if track.share_of_time(form, seconds=0.2) <= share:
            fast = middle
        else:
            slow = middle
    return front[fast] if fast >= 0 else None


def main(
    only: Annotated[list[str] | None, typer.Option(help="a network; may be repeated")] = None,
    methods: Annotated[list[str] | None, typer.Option(help="others keep their results")] = None,
    most: Annotated[int, typer.Option(help="layers of each network, by MACs")] = 3,
    whole: Annotated[bool, typer.Option(help="time the fit of a whole network")] = False,
    patience: Annotated[int, typer.Option(help="seconds for a method on a layer")] = 600,
    threads: int = 2,
    out: Path = HERE / "methods.json",
) -> None:
    torch.set_num_threads(threads)
    facts = json.loads(out.read_text()) if out.exists() else {"networks": {}, "machines": {}}
    names = methods or [name for name in METHODS if name != "fewer-units"]
    for network in only or ([] if whole else NETWORKS):
        torch.manual_seed(0)
        model, data = NETWORKS[network]()
        known = facts["networks"].get(network, [])
        facts["networks"][network] = [row for row in known if row["method"] not in names]
        facts["machines"].setdefault(network, {}).update(dict.fromkeys(names, machine()))
        for row in compare(model, data, most, names, patience):
            facts["networks"][network].append(row)
            save(out, facts)
    if whole:
        facts["whole"] = list(fit_all(*NETWORKS[WHOLE](), names))
        facts["machines"]["whole"] = dict.fromkeys(names, machine())
        save(out, facts)
    write_document(facts)


def write_document(facts: dict[str, Any]) -> None:
    for network, rows in facts["networks"].items():
        picture = f"methods-{network}.svg"
        draw(rows, DOCUMENT.parent / picture)
        text = f"{table(rows)}\n![Error against time]({picture})\n\n{where(facts, network, rows)}"
        between_markers(DOCUMENT, network, text)
    if "whole" in facts:
        rows = [(r["method"], str(r["layers"]), f"{r['seconds']:.1f}") for r in facts["whole"]]
        whole = markdown_table(("method", "convolutions", "seconds"), rows)
        between_markers(DOCUMENT, "whole", f"{whole}\n{where(facts, 'whole', facts['whole'])}")


def where(facts: dict[str, Any], of: str, rows: Sequence[dict[str, Any]]) -> str:
    """On which machine these methods were measured, or which were measured on which."""
    methods: dict[str, list[str]] = {}
    for name in dict.fromkeys(row["method"] for row in rows):
        machine = facts["machines"][of][name]
        on = ", ".join(f"{fact} {value}" for fact, value in machine.items())
        methods.setdefault(on, []).append(f"`{name}`")
    if len(methods) == 1:
        return f"Measured on: {next(iter(methods))}.\n"
    return "\n\n".join(f"{', '.join(names)}: on {on}." for on, names in methods.items()) + "\n"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Medians over layers: response error / speed-up at each share; seconds for the first share."""
    shares = [("macs", share) for share in SHARES] + [("time", share) for share in TIME_SHARES]
    lines = []
    for name in dict.fromkeys(row["method"] for row in rows):
        own, given_up = of_method(rows, name)
        cells = [
            cell([row for row in own if (row["of"], row["share"]) == at], rows) for at in shares
        ]
        seconds = f"{sum(row['seconds'] for row in own):.1f}"
        if given_up:
            seconds = f"given up after {given_up[0]['gave_up_after']}"
        lines.append((name, *cells, seconds))
    layers = layers_of(rows)
    of = f"median of {len(layers)} layers" if len(layers) > 1 else "one layer"
    title = f"response error / speed-up, {of}"
    header = [f"{share:.0%} of {'MACs' if kind == 'macs' else 'time'}" for kind, share in shares]
    return markdown_table((title, *header, "seconds in all"), lines)


def of_method(
    rows: Sequence[dict[str, Any]], name: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Its results, and where it was given up."""
    own = [row for row in rows if row["method"] == name]
    given_up = [row for row in own if "gave_up_after" in row]
    return [row for row in own if "gave_up_after" not in row], given_up


def layers_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["layer"] for row in rows))


def cell(found: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> str:
    layers = len(layers_of(rows))
    if len(found) < layers:
        return f"reached on {len(found)} of {layers}" if found else ""
    error = median(row["response_error"] for row in found)
    return f"{error:.3f} / {median(row['speedup'] for row in found):.1f}x"


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Error against the share of the dense time, a panel for each layer."""
    from matplotlib.figure import Figure

    layers = list(dict.fromkeys(row["layer"] for row in rows))
    figure = Figure(figsize=(5 * len(layers) + 2, 4.5), layout="constrained")
    for axes, layer in zip(figure.subplots(1, len(layers), squeeze=False)[0], layers, strict=True):
        for index, name in enumerate(dict.fromkeys(row["method"] for row in rows)):
            own = [row for row in of_method(rows, name)[0] if row["layer"] == layer]
            points = sorted(own, key=lambda row: 1 / row["speedup"])
            style = ("o-", "s--", "^:")[index // 10 % 3]
            axes.semilogy(
                [1 / row["speedup"] for row in points],
                [row["response_error"] for row in points],
                style,
                label=name,
            )
        axes.set(title=layer, xlabel="time, share of the dense layer's", ylabel="response error")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path)


if __name__ == "__main__":
    typer.run(main)
