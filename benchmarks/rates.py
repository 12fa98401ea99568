"""Why fewer multiplications are not as much less time: how fast each kind of convolution runs.

Dense networks and plans for 30 % of the MACs, batch norms folded in both, in eager mode: each
convolution is timed in its place, the networks in turns, and the medians of rounds are told. The
realised speed-up then has two parts, of which each is told alone: the time outside of convolutions
stays, and thin convolutions make fewer multiplications in a second. Candidate ranks are multiples
of 8, of 16 and of 32. Writes rates.json and a table of docs/results.md.
"""

import json
import math
import statistics
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from race import between_markers, machine, markdown_table, save
from suite import cases
from torch import nn

import rankfold
from rankfold.analysis.in_context import shares_inside
from rankfold.batches import run
from rankfold.cost import count_macs
from rankfold.measure import in_fastest_memory_format, latencies
from rankfold.methods import METHODS

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "results.md"
CPU = torch.device("cpu")
NAMES = ("demo", "crepe", "craft")
SHARE = 0.3  # of the MACs
ALIGNMENTS = (8, 16, 32)
ROUNDS = 5
KINDS = ("1x1", "kx1 and 1xk", "kxk")  # by the number of axes above 1
ELSE = "all else"


def multiplications(
    layers: dict[str, nn.Conv2d], network: nn.Module, batch: torch.Tensor
) -> dict[str, int]:
    """Of each convolution."""
    found: dict[str, int] = {}

    def note(name: str, layer: nn.Conv2d, output: torch.Tensor) -> None:
        found[name] = output.numel() * math.prod(layer.weight.shape[1:])

    hooks = [
        layer.register_forward_hook(lambda one, _, output, name=name: note(name, one, output))
        for name, layer in layers.items()
    ]
    run(network, batch)
    for one in hooks:
        one.remove()
    return found


def by_kind(network: nn.Module, batch: torch.Tensor) -> dict[str, float]:
    """Milliseconds of the convolutions of each kind, and what is left of the whole."""
    layers = convolutions(network)
    (whole,) = latencies([lambda: run(network, batch)], CPU)
    shares = shares_inside(list(layers.values()), lambda: run(network, batch), CPU)
    found: dict[str, float] = defaultdict(float)
    for one in layers.values():
        found[kind_of(one)] += whole * shares[one]
    return {**found, ELSE: whole - sum(found.values())}


def convolutions(network: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: one for name, one in network.named_modules() if isinstance(one, nn.Conv2d)}


def kind_of(layer: nn.Conv2d) -> str:
    return KINDS[sum(size > 1 for size in layer.kernel_size)]


def in_turns(
    networks: dict[str, nn.Module], batch: torch.Tensor
) -> dict[str, dict[str, dict[str, float]]]:
    """By network and kind: MACs, and milliseconds, the median, the least and the most."""
    ready = {name: in_fastest_memory_format(one, batch) for name, one in networks.items()}
    rounds = [{name: by_kind(one, batch) for name, one in ready.items()} for _ in range(ROUNDS)]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, network in ready.items():
        layers, macs = convolutions(network), dict.fromkeys((*KINDS, ELSE), 0)
        for layer, count in multiplications(layers, network, batch).items():
            macs[kind_of(layers[layer])] += count
        found[name] = {}
        for kind in rounds[0][name]:
            times = [one[name][kind] for one in rounds]
            spread = {"least": min(times), "most": max(times)}
            found[name][kind] = {"ms": statistics.median(times), **spread, "MACs": macs[kind]}
    return found


def measured(name: str) -> dict[str, Any]:
    """The dense network, and plans with ranks of each alignment: kinds, MACs and scores."""
    case = cases.make(name)
    model, batch = case.make_model().eval(), case.data[0]
    networks = {"dense": model}
    for alignment in ALIGNMENTS:
        methods = [replace(one, alignment=alignment) for one in aligned_methods()]
        plan = rankfold.analyze(model, case.data, methods=methods).plan(macs=SHARE)
        networks[f"ranks in {alignment}s"] = rankfold.factorize(model, plan).eval()
    with torch.no_grad():
        folded = {key: rankfold.fold_batch_norms(one, batch) for key, one in networks.items()}
        kinds = in_turns(folded, batch)
        return {
            key: {
                "MACs": count_macs(lambda one=one: run(one, batch)),
                "score": case.score(one),
                "kinds": kinds[key],
            }
            for key, one in networks.items()
        }


def aligned_methods() -> list[Any]:
    """Of the default ones, those that convolutions are given."""
    return [METHODS[name]() for name in ("tucker2", "svd", "separable")]


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(NAMES)}")] = None,
    threads: int = 2,
    out: Path = HERE / "rates.json",
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    facts: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"networks": {}}
    facts["machine"] = machine()
    for name in only or NAMES:
        facts["networks"][name] = measured(name)
        print(name, json.dumps(facts["networks"][name], indent=1), flush=True)
        save(out, facts)
    write_document(facts)


def write_document(facts: dict[str, Any]) -> None:
    header = ("", "MACs", "score", *(f"{kind}, ms (G/s)" for kind in KINDS), f"{ELSE}, ms")
    header = (*header, "together", "realised", "had nothing else taken time", "had rates stayed")
    lines = []
    for network, rows in facts["networks"].items():
        dense = rows["dense"]
        for name, row in rows.items():
            kinds = (_rate(row["kinds"].get(kind)) for kind in KINDS)
            left = row["kinds"][ELSE]
            rest = f"{left['ms']:.1f} ({left['least']:.1f} to {left['most']:.1f})"
            cells = (f"{row['MACs'] / dense['MACs']:.0%}", f"{100 * row['score']:.1f}", *kinds)
            lines.append((f"{network}, {name}", *cells, rest, *_parts(dense, row)))
    table = markdown_table(header, lines)
    on = ", ".join(f"{name} {value}" for name, value in facts["machine"].items())
    between_markers(DOCUMENT, "rates", f"{table}\nMeasured on: {on}.\n")


def _rate(kind: dict[str, float] | None) -> str:
    """Milliseconds, and thousand millions of multiply-accumulates in a second."""
    return "" if kind is None else f"{kind['ms']:.1f} ({kind['MACs'] / kind['ms'] / 1e6:.0f})"


def _parts(dense: dict[str, Any], row: dict[str, Any]) -> tuple[str, ...]:
    """The whole time; the realised speed-up as it is, of convolutions alone, at dense rates."""
    whole, before = (sum(one["ms"] for one in of["kinds"].values()) for of in (row, dense))
    if row is dense:
        return (f"{whole:.1f} ms", "", "", "")
    fewer = dense["MACs"] / row["MACs"]
    left, left_before = (of["kinds"][ELSE]["ms"] for of in (row, dense))
    at_dense_rates = (before - left_before) / fewer + left
    return (
        f"{whole:.1f} ms",
        f"{before / whole / fewer:.0%}",
        f"{(before - left_before) / (whole - left) / fewer:.0%}",
        f"{before / at_dense_rates / fewer:.0%}",
    )


if __name__ == "__main__":
    typer.run(main)
