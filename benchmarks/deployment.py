"""What folding batch norms and merging adjacent layers brings on real networks.

Each network as it is trained, and factorized to a share of its MACs, is timed as it is, with batch
norms folded, and with adjacent layers merged too, taking turns, one input at a time. Writes
benchmarks/deployment.json and a table of docs/deployment.md.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer
from race import between_markers, machine, markdown_table, save
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import rankfold
from rankfold import demo
from rankfold.batches import device_of, run
from rankfold.cost import count_macs, count_parameters
from rankfold.measure import in_fastest_memory_format, latencies, output_error

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "deployment.md"
sys.path.append(str(HERE.parent / "examples"))
MACS = 0.3  # kept of the whole network


def scene_text() -> tuple[nn.Module, torch.Tensor]:
    """One word of middling width."""
    from ocr_models import make_recogniser
    from rendered_text import split_fonts, word_batches

    words = [images for images, _ in word_batches(200, split_fonts()[0], seed=0)]
    return make_recogniser(), sorted(words, key=lambda w: w.shape[-1])[len(words) // 2][:1]


def text_detection() -> tuple[nn.Module, torch.Tensor]:
    """One page of 256x320."""
    from ocr_models import make_detector
    from rendered_text import page_batches, split_fonts

    return make_detector(), page_batches(2, split_fonts()[0], seed=0)[0][:1]


def demonstration() -> tuple[nn.Module, torch.Tensor]:
    return demo.make_model(), next(iter(demo.make_data()))[:1]


NETWORKS: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "english_g2": scene_text,
    "CRAFT": text_detection,
    "demo": demonstration,
}


def of_network(name: str, model: nn.Module, batch: torch.Tensor) -> dict[str, Any]:
    plain = in_fastest_memory_format(model, batch).eval()
    made = {
        "as it is": plain,
        "folded": rankfold.fold_batch_norms(plain, batch),
        "merged": rankfold.merge_adjacent(plain, batch),
    }
    with torch.no_grad():
        outputs = plain(batch)
        calls = [partial(run, network, batch) for network in made.values()]
        milliseconds = latencies(calls, device_of(plain))
        row = {"network": name, "shape": list(batch.shape)} | {
            kind: {
                "milliseconds": taken,
                "parameters": count_parameters(network),
                "macs": count_macs(partial(run, network, batch)),
                "batch_norms": sum(isinstance(one, _BatchNorm) for one in network.modules()),
                "layers": sum(isinstance(one, nn.Linear | nn.Conv2d) for one in network.modules()),
                "error": output_error(outputs, network(batch)),
            }
            for (kind, network), taken in zip(made.items(), milliseconds, strict=True)
        }
    print(row, flush=True)
    return row


def main(threads: int = 2, out: Path = HERE / "deployment.json") -> None:
    torch.set_num_threads(threads)
    rows = []
    for name, make in NETWORKS.items():
        model, batch = make()
        plan = rankfold.analyze(model, [batch], metric="weight").plan(macs=MACS)
        rows.append(of_network(name, model, batch))
        rows.append(of_network(f"{name}, factorized", rankfold.factorize(model, plan), batch))
    facts = {"machine": machine(), "macs": MACS, "networks": rows}
    save(out, facts)
    write_document(facts)


def write_document(facts: dict[str, Any]) -> None:
    header = ("", "batch norms", "layers", "parameters", "MACs", "time", "relative error")
    on = ", ".join(f"{name} {value}" for name, value in facts["machine"].items())
    table = markdown_table(header, [_row(row) for row in facts["networks"]])
    between_markers(DOCUMENT, "deployment", f"{table}\nMeasured on: {on}.\n")


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    kinds = [row["as it is"], row["folded"], row["merged"]]

    def each(show: Callable[[dict[str, Any]], str]) -> str:
        return ", ".join(map(show, kinds))

    return (
        f"{row['network']} ({'x'.join(map(str, row['shape']))})",
        each(lambda kind: str(kind["batch_norms"])),
        each(lambda kind: str(kind["layers"])),
        each(lambda kind: f"{kind['parameters'] / 1e6:.2f}") + " M",
        each(lambda kind: f"{kind['macs'] / 1e6:.0f}") + " M",
        each(lambda kind: f"{kind['milliseconds']:.2f}") + " ms",
        f"{row['folded']['error']:.0e}, {row['merged']['error']:.0e}",
    )


if __name__ == "__main__":
    typer.run(main)
