"""The same networks on a GPU: does the speed-up hold there, and where do two thin products lose?

Networks dense and factorized, planned by MACs and by the device's own clock, batch norms folded in
both: milliseconds of a batch by the device's events, in turns, in float32 (of which convolutions
take ten binary digits, TF32, as is torch's default) and in bfloat16; in eager mode, as a CUDA
graph, compiled, and compiled as a CUDA graph. Linear layers in bfloat16 beside two thin ones of a
share of their MACs, over sizes and numbers of rows. Writes gpu.json, in which what is there is not
done again, and tables of docs/results.md.
"""

import copy
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from race import between_markers, machine, markdown_table, save
from torch import nn

import rankfold
from rankfold.batches import map_tensors, run, to_device
from rankfold.clock import mark, seconds_between
from rankfold.errors import RankfoldError
from rankfold.measure import in_fastest_memory_format, latencies
from rankfold.runtime import GraphNetwork, call_of, caller

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "results.md"
sys.path.append(str(HERE.parent / "examples"))

DEVICE = torch.device("cuda")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TIME = 0.5  # asked for of the dense network's, as a CUDA graph
ROWS = (64, 1024, 16384)
SIZES = ((1024, 1024), (1024, 4096), (4096, 4096))  # inputs, outputs
LINEAR_SHARES = (0.5, 0.25, 0.125)  # of the MACs
SETS = 4  # of inputs and weights, in turn


@dataclass(frozen=True)
class Network:
    model: nn.Module
    data: list[Any]  # to calibrate on
    copies: int  # of the first batch, that are timed together
    share: float  # of the MACs


def demo() -> Network:
    from rankfold import demo

    return Network(demo.make_model(), demo.make_data()[:40], 16, 0.3)


def crepe() -> Network:
    import crepe

    data = crepe.make_data()[1:]
    return Network(crepe.make_model(), data[:20], 16, 0.3)


def english_g2() -> Network:
    from ocr_models import make_recogniser
    from rendered_text import split_fonts, word_batches

    words = [images for images, _ in word_batches(320, split_fonts()[0], seed=0)]
    words.sort(key=lambda images: images.shape[-1])
    return Network(make_recogniser(), [words[len(words) // 2], *words], 4, 0.3)


def craft() -> Network:
    from ocr_models import make_detector
    from rendered_text import page_batches, split_fonts

    return Network(make_detector(), page_batches(8, split_fonts()[0], seed=0), 2, 0.3)


def bert() -> Network:
    import minilm

    return Network(minilm.make_model(), minilm.make_data(), 8, 0.5)


NETWORKS: dict[str, Callable[[], Network]] = {
    "demo": demo,
    "CREPE": crepe,
    "english_g2": english_g2,
    "CRAFT": craft,
    "MiniLM": bert,
}


def of_dtype(batch: Any, dtype: torch.dtype) -> Any:
    return map_tensors(batch, lambda one: one.to(dtype) if one.is_floating_point() else one)


def enlarged(batch: Any, copies: int) -> Any:
    return map_tensors(batch, lambda one: one.repeat(copies, *(one.dim() - 1) * [1]))


Calls = list[Callable[[], Any]]


def eager(networks: list[nn.Module], batch: Any) -> Calls:
    return [caller(one, batch, run, "eager") for one in networks]


def graph(networks: list[nn.Module], batch: Any) -> Calls:
    return [caller(one, batch, run, "cuda-graph") for one in networks]


def compiled(networks: list[nn.Module], batch: Any) -> Calls:
    torch.compiler.reset()
    return eager([torch.compile(one, dynamic=False) for one in networks], batch)


def compiled_graph(networks: list[nn.Module], batch: Any) -> Calls:
    calls = [call_of(one, batch, run) for one in networks]
    torch.compiler.reset()
    fast: list[Any] = [torch.compile(one, dynamic=False) for one in networks]
    return eager([GraphNetwork(one, call) for one, call in zip(fast, calls, strict=True)], batch)


WAYS = {
    "eager": eager,
    "graph": graph,
    "compiled": compiled,
    "compiled, graph": compiled_graph,
}


def time_both(
    dense: nn.Module,
    small: nn.Module,
    batch: Any,
    found: dict[str, dict[str, Any]],
    keep: Callable[[], None],
) -> None:
    """Milliseconds of both, by dtype and way, or why there are none; what is there is kept."""
    for name, dtype in DTYPES.items():
        given = of_dtype(batch, dtype)
        networks = [
            in_fastest_memory_format(copy.deepcopy(one).to(dtype), given, runtime="cuda-graph")
            for one in (dense, small)
        ]
        known = found.setdefault(name, {})
        for way, make in WAYS.items():
            if way in known:
                continue
            try:
                known[way] = latencies(make(networks, given), DEVICE, seconds=1.0)
            except RankfoldError as error:
                known[way] = str(error)
            print(name, way, known[way], flush=True)
            keep()


def measure(name: str, found: dict[str, Any], keep: Callable[[], None]) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]()
    model = network.model.to(DEVICE).eval()
    data = [to_device(batch, DEVICE) for batch in network.data]
    batch = enlarged(data[0], network.copies)
    dense = rankfold.fold_batch_norms(model, batch)
    found["rows"] = len(next(iter(tensors(batch))))
    for how, make in {"by MACs": by_macs, "by clock": by_clock}.items():
        if is_done(found.get(how, {})):
            continue
        try:
            small = make(model, [batch, *data], network.share)
        except RankfoldError as error:
            found[how] = {"why not": str(error)}
            keep()
            continue
        plan = rankfold.record_of(small).plan
        row = found.setdefault(how, {"ms": {}})
        row["MACs"] = plan.before.macs / plan.after.macs
        row["left"] = sum(entry.method is None for entry in plan.layers)
        with torch.no_grad():
            time_both(dense, rankfold.fold_batch_norms(small, batch), batch, row["ms"], keep)


def is_done(row: dict[str, Any]) -> bool:
    known = row.get("ms", {})
    return "why not" in row or all(way in known.get(name, {}) for name in DTYPES for way in WAYS)


def by_macs(model: nn.Module, data: list[Any], share: float) -> nn.Module:
    return rankfold.factorize(model, rankfold.analyze(model, data[1:]).plan(macs=share))


def by_clock(model: nn.Module, data: list[Any], share: float) -> nn.Module:
    return rankfold.compress(
        model, data, latency=TIME, runtime="cuda-graph", epochs=0, test=data[:1]
    )


def tensors(batch: Any) -> Iterator[torch.Tensor]:
    yield from batch.values() if isinstance(batch, dict) else [batch]


def linear(rows: int, inputs: int, outputs: int, share: float) -> dict[str, float]:
    """Microseconds of a dense layer and of two thin ones, in a CUDA graph."""
    rank = round(share * inputs * outputs / (inputs + outputs) / 16) * 16
    options: dict[str, Any] = {"device": DEVICE, "dtype": torch.bfloat16}
    dense, thin = [], []
    for _ in range(SETS):
        given = torch.randn(rows, inputs, **options)
        dense.append((nn.Linear(inputs, outputs, **options), given))
        first = nn.Linear(inputs, rank, bias=False, **options)
        thin.append((nn.Sequential(first, nn.Linear(rank, outputs, **options)), given))
    with torch.no_grad():
        dense_us, thin_us = in_graphs([dense, thin])
    return {"rank": rank, "dense": dense_us, "thin": thin_us}


def in_graphs(contenders: list[list[tuple[nn.Module, torch.Tensor]]]) -> list[float]:
    """Microseconds of one layer of each, their graphs taking turns."""
    graphs, times = [], [[] for _ in contenders]
    for layers in contenders:
        for layer, given in layers:
            layer(given)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for layer, given in layers:
                layer(given)
        graphs.append(graph)
    for turn in range(33):
        for index, graph in enumerate(graphs):
            start = mark(DEVICE)
            graph.replay()
            seconds = seconds_between(start, mark(DEVICE))
            if turn > 2:
                times[index].append(seconds)
    return [1e6 * statistics.median(each) / SETS for each in times]


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(NETWORKS)}")] = None,
    only_write: bool = False,
    out: Path = HERE / "gpu.json",
) -> None:
    facts: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    facts.setdefault("networks", {})
    if not only_write:
        facts["machine"] = machine()
        if "linear" not in facts and not only:
            facts["linear"] = [
                {"rows": rows, "size": size, "share": share, **linear(rows, *size, share)}
                for size in SIZES
                for share in LINEAR_SHARES
                for rows in ROWS
            ]
            save(out, facts)
        for name in only or NETWORKS:
            measure(name, facts["networks"].setdefault(name, {}), partial(save, out, facts))
    write_document(facts)


def write_document(facts: dict[str, Any]) -> None:
    on = ", ".join(f"{name} {value}" for name, value in facts["machine"].items())
    header = ("network, batch", "MACs", "dtype", *WAYS)
    lines: list[tuple[str, ...]] = []
    refused: list[str] = []
    for name, row in facts["networks"].items():
        for how, title in (("by MACs", "planned by MACs"), ("by clock", "planned by the clock")):
            found = row.get(how, {"why not": "not run"})
            what = f"{name}, {row['rows']}, {title}"
            if "why not" in found:
                refused.append(f"{what}: {found['why not']}")
                continue
            for dtype, ms in found["ms"].items():
                first = (what, f"{found['MACs']:.1f}x less" if "MACs" in found else "not kept")
                lines.append((*first, dtype, *(_shown(ms.get(way, "not run")) for way in WAYS)))
    text = f"{markdown_table(header, lines)}\nMeasured on: {on}.\n"
    text += "".join(f"\n- {line}" for line in refused) + "\n"
    between_markers(DOCUMENT, "gpu", text)
    if "linear" in facts:
        header = ("inputs x outputs", "rank (MACs)", *(f"{rows} rows" for rows in ROWS))
        lines = []
        for size in SIZES:
            for share in LINEAR_SHARES:
                cells = [
                    one
                    for one in facts["linear"]
                    if tuple(one["size"]) == size and one["share"] == share
                ]
                shown = [
                    f"{one['dense']:.1f} → {one['thin']:.1f} µs: {one['dense'] / one['thin']:.2f}x"
                    for one in sorted(cells, key=lambda one: one["rows"])
                ]
                rank = f"{cells[0]['rank']} ({share:.1%})"
                lines.append((f"{size[0]} x {size[1]}", rank, *shown))
        between_markers(DOCUMENT, "gpu linear", markdown_table(header, lines))


def _shown(milliseconds: list[float] | str) -> str:
    if isinstance(milliseconds, str):
        return milliseconds
    dense, ours = milliseconds
    return f"{dense:.2f} → {ours:.2f} ms: {dense / ours:.2f}x"


if __name__ == "__main__":
    typer.run(main)
