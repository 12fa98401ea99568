"""A language model that memory does not hold, compressed from disk to disk.

Writes a synthetic checkpoint of the shapes of an 8-billion-parameter Llama (4096 features, 14336
in between, 8 heads of keys and values for 32 of queries, 128256 tokens) in bfloat16, of as many of
its 32 blocks as asked for; compresses it in a process of its own; loads what came out, in another.
Writes, to benchmarks/large_model.json and a table of docs/from_disk.md, the time of each layer, the
peak of the memory that is the process's own (the pages of its files are the system's to take back),
and what 32 blocks come to; run on all of them it wants some 45 GB of disk.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import llama
import torch
import typer
from race import between_markers, machine, markdown_table, save

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "from_disk.md"
ALL_BLOCKS = 32
SEQUENCES, LENGTH = 4, 128  # that the network is run on
GIGABYTE = 1e9


def load(directory: Path) -> None:
    """In this process; prints a line of JSON."""
    import rankfold

    watched, start = llama.Watched(), time.perf_counter()
    model = rankfold.load(directory)
    with torch.no_grad():
        finite = bool(torch.isfinite(model(input_ids=torch.arange(8)[None]).logits).all())
    print(json.dumps({"seconds": time.perf_counter() - start, "peak": watched.end(), "ok": finite}))


def in_its_own_process(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(
    blocks: int = 2,
    params: Annotated[
        float, typer.Option(help="share kept; of few blocks embeddings are most")
    ] = 0.85,
    folder: Annotated[Path | None, typer.Option(help="with room for it")] = None,
    on_data: Annotated[bool, typer.Option(help="or by weights alone")] = True,
    threads: int = 2,
    out: Path = HERE / "large_model.json",
    step: Annotated[list[str] | None, typer.Option(hidden=True)] = None,
) -> None:
    torch.set_num_threads(threads)
    if step:  # in a process of its own
        name, source, *rest = step
        if name == "load":
            load(Path(source))
        else:
            sequences = SEQUENCES if on_data else 0
            facts = llama.compress(Path(source), Path(rest[0]), params, sequences, LENGTH)
            print(json.dumps(facts))
        return
    room = Path(tempfile.mkdtemp(dir=folder))
    try:
        source, small = room / "dense", room / "small"
        llama.Llama().write(source, blocks)
        bytes_of_source = sum(path.stat().st_size for path in source.iterdir())
        options = [f"--params={params}", f"--threads={threads}"]
        options.append("--on-data" if on_data else "--no-on-data")
        steps = ["--step=compress", f"--step={source}", f"--step={small}"]
        facts = {
            "machine": machine(),
            "blocks": blocks,
            "on_data": on_data,
            "params": params,
            "bytes": bytes_of_source,
            "compressed": in_its_own_process(*options, *steps),
            "bytes_after": sum(path.stat().st_size for path in small.iterdir()),
            "loaded": in_its_own_process(*options, "--step=load", f"--step={small}"),
        }
    finally:
        shutil.rmtree(room)
    print(json.dumps(facts, indent=1))
    save(out, facts)
    write_document(facts)


def write_document(facts: dict[str, Any]) -> None:
    done, loaded = facts["compressed"], facts["loaded"]
    rows = []
    per_block = 0.0
    for shape, seconds in done["layers"].items():
        mean = sum(seconds) / len(seconds)
        of_blocks = len(seconds) >= facts["blocks"]
        per_block += sum(seconds) / facts["blocks"] if of_blocks else 0.0
        rows.append((f"a layer of {shape[1:-1].replace(', ', ' x ')}", f"{mean:.1f} s"))
    writing = done["seconds"] - sum(sum(seconds) for seconds in done["layers"].values())
    before, after = done["parameters"]
    rows += [
        ("all layers of a block", f"{per_block:.0f} s"),
        ("all else: running, planning, reading and writing", f"{writing:.0f} s"),
        ("the whole", f"{done['seconds']:.0f} s"),
        ("parameters", f"{before / 1e9:.2f} to {after / 1e9:.2f} billion"),
        ("files", f"{facts['bytes'] / GIGABYTE:.1f} to {facts['bytes_after'] / GIGABYTE:.1f} GB"),
        ("peak of memory", f"{done['peak'] / GIGABYTE:.1f} GB"),
        ("loading it and a run: peak of memory", f"{loaded['peak'] / GIGABYTE:.1f} GB"),
    ]
    if facts["blocks"] < ALL_BLOCKS:
        hours = f"{ALL_BLOCKS * per_block / 3600:.1f} h for their layers"
        rows.append((f"{ALL_BLOCKS} blocks, by these times", hours))
    on = ", ".join(f"{name} {value}" for name, value in facts["machine"].items())
    table = markdown_table((f"{facts['blocks']} of {ALL_BLOCKS} blocks", ""), rows)
    between_markers(DOCUMENT, "large model", f"{table}\nMeasured on: {on}.\n")


if __name__ == "__main__":
    typer.run(main)
