"""How compressing from disk grows: with the width, the depth and the data, to a billion parameters.

Synthetic checkpoints of the shapes of a Llama (8 heads of keys for 32 of queries, 3.5 times as many
features in between) are compressed from disk to disk, one layer in memory at a time, in processes
of their own: one block ever wider, ever more blocks, ever more tokens to calibrate on, and 1.09
billion parameters of linear layers. A block as wide as those of a Llama of 70 billion parameters
is extrapolated from the widest two, as one of 4096 features is from the two before it, to see how
far that can be believed. Writes scale.json, in which what is there is not done again, and a table
of docs/from_disk.md.
"""

import json
import math
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from large_model import DOCUMENT, GIGABYTE
from llama import Llama, compress
from race import between_markers, machine, markdown_table, save

HERE = Path(__file__).parent
LENGTH = 128  # tokens of a sequence
PARAMS = 0.7  # kept


@dataclass(frozen=True)
class Experiment:
    features: int
    blocks: int = 1
    tokens: int = 2048

    @property
    def name(self) -> str:
        blocks = "1 block" if self.blocks == 1 else f"{self.blocks} blocks"
        return f"{self.features} features, {blocks}, {self.tokens} tokens"

    @property
    def network(self) -> Llama:
        heads = self.features // 128
        return Llama(self.features, 7 * self.features // 2, heads, max(1, heads // 4), 1024)


WIDTHS = [Experiment(features) for features in (512, 1024, 2048, 4096)]
DEPTHS = [Experiment(512, blocks) for blocks in (5, 10, 20, 40, 80)]
DATA = [Experiment(1024, tokens=tokens) for tokens in (512, 2048, 8192, 32768)]
BILLION = Experiment(4096, blocks=5)
LARGEST, LARGEST_BLOCKS = Llama(8192, 28672, 64, 8), 80  # a Llama of 70 billion parameters


def measured(experiment: Experiment, threads: int) -> dict[str, Any]:
    """In a process of its own."""
    command = [sys.executable, __file__, "--threads", str(threads)]
    command += ["--trial", json.dumps(asdict(experiment))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def tried(experiment: Experiment) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as room:
        source = Path(room, "dense")
        experiment.network.write(source, experiment.blocks)
        sequences = experiment.tokens // LENGTH
        return compress(source, Path(room, "small"), PARAMS, sequences, LENGTH)


def main(
    threads: int = 2,
    out: Path = HERE / "scale.json",
    trial: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    torch.set_num_threads(threads)
    if trial is not None:
        print(json.dumps(tried(Experiment(**json.loads(trial)))))
        return
    facts: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"rows": {}}
    facts["machine"] = machine()
    for experiment in (*WIDTHS, *DEPTHS, *DATA, BILLION):
        if experiment.name not in facts["rows"]:
            facts["rows"][experiment.name] = found = measured(experiment, threads)
            print(experiment.name, found["seconds"], found["peak"], flush=True)
            save(out, facts)
    write_document(facts)


def write_document(facts: dict[str, Any]) -> None:
    rows = facts["rows"]
    header = ("network", "layers", "parameters of them", "decomposing", "planning", "all", "memory")
    every = dict.fromkeys([*WIDTHS, *DEPTHS, *DATA, BILLION])
    table = markdown_table(header, [_row(one, rows[one.name]) for one in every])
    on = ", ".join(f"{name} {value}" for name, value in facts["machine"].items())
    text = f"{table}\n{extrapolated(rows)}\n\nMeasured on: {on}.\n"
    between_markers(DOCUMENT, "scale", text)


def _row(experiment: Experiment, row: dict[str, Any]) -> tuple[str, ...]:
    count = sum(len(seconds) for seconds in row["layers"].values())
    return (
        experiment.name,
        str(count),
        f"{experiment.blocks * experiment.network.of_a_block / 1e6:.0f} M",
        f"{decomposing(row):.1f} s",
        f"{row['planning']:.2f} s",
        f"{row['seconds']:.1f} s",
        f"{row['peak'] / GIGABYTE:.2f} GB",
    )


def decomposing(row: dict[str, Any]) -> float:
    """Seconds in which all layers are decomposed."""
    return sum(sum(seconds) for seconds in row["layers"].values())


def extrapolated(rows: dict[str, Any]) -> str:
    """What follows for the widest network, and how well the same would have told of the one before.

    Powers of the width, by the last two, no more than the third of seconds: that is the power of
    what is done, which small layers hide behind their other costs.
    """
    widths = [rows[one.name] for one in WIDTHS]
    seconds, peaks = [decomposing(row) for row in widths], [row["peak"] for row in widths]
    known = _next(seconds[:-1], 3)
    block, memory = _next(seconds, 3), _next(peaks, 2)
    size = LARGEST_BLOCKS * LARGEST.of_a_block
    return (
        f"A block of {LARGEST.features} features would take {block / 60:.0f} minutes and "
        f"{memory / GIGABYTE:.0f} GB, the {size / 1e9:.0f} billion parameters of "
        f"{LARGEST_BLOCKS} such blocks {LARGEST_BLOCKS * block / 3600:.0f} hours and hardly "
        f"more memory. Of {WIDTHS[-1].features} features the same rule says {known:.0f} s, where "
        f"{seconds[-1]:.0f} s were measured."
    )


def _next(series: list[float], greatest: float) -> float:
    """At twice the width."""
    power = math.log2(series[-1] / series[-2])
    return series[-1] * 2 ** min(power, greatest)


if __name__ == "__main__":
    typer.run(main)
