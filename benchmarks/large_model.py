"""A language model that memory does not hold, compressed from disk to disk.

Writes a synthetic checkpoint of the shapes of an 8-billion-parameter Llama (4096 features, 14336
in between, 8 heads of keys and values for 32 of queries, 128256 tokens) in bfloat16, of as many of
its 32 blocks as asked for; compresses it in a process of its own; loads what came out, in another.
Writes, to benchmarks/large_model.json and a table of docs/from_disk.md, the time of each layer, the
peak of the memory that is the process's own (the pages of its files are the system's to take back),
and what 32 blocks come to.
"""

import json
import math
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from race import between_markers, machine, markdown_table, save

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "from_disk.md"
FEATURES, BETWEEN, HEADS, KEY_HEADS, TOKENS = 4096, 14336, 32, 8, 128256
ALL_BLOCKS = 32
SEQUENCES, LENGTH = 4, 128  # that the network is run on
GIGABYTE = 1e9
_STRONG = 64  # directions that hold most of a weight


def configuration(blocks: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=FEATURES,
        intermediate_size=BETWEEN,
        num_hidden_layers=blocks,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        vocab_size=TOKENS,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )


def write_checkpoint(directory: Path, blocks: int) -> None:
    """Weights with a few strong directions and noise, a block at a time."""
    from rankfold.pretrained import empty_pretrained
    from rankfold.shards import grouped, shard_name, write_index, write_shard

    directory.mkdir()
    (directory / "config.json").write_text(configuration(blocks).to_json_string())
    generator = torch.Generator().manual_seed(0)
    empty = empty_pretrained(directory).state_dict()
    sizes = {name: 2 * tensor.numel() for name, tensor in empty.items()}
    groups = list(grouped(sizes, 2**30))
    shards = {shard_name(place, len(groups)): names for place, names in enumerate(groups)}
    for file, names in shards.items():
        tensors = {n: make_weight(tuple(empty[n].shape), generator) for n in names}
        write_shard(tensors, directory / file)
    write_index(directory, shards, sum(sizes.values()))


def make_weight(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    rows, columns = shape
    noise = torch.randn(rows, columns, generator=generator)
    left = torch.randn(rows, _STRONG, generator=generator)
    right = torch.randn(_STRONG, columns, generator=generator) / math.sqrt(_STRONG)
    return ((0.5 * noise + left @ right) / math.sqrt(columns)).bfloat16()


class Watched:
    """Bytes of memory of this process alone, the most at any time."""

    def __init__(self) -> None:
        self.peak, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            status = Path("/proc/self/status").read_text()
            (line,) = (one for one in status.splitlines() if one.startswith("RssAnon"))
            self.peak = max(self.peak, 1024 * int(line.split()[1]))

    def end(self) -> int:
        self._done.set()
        self._thread.join()
        return self.peak


def compress(source: Path, target: Path, params: float, on_data: bool) -> None:
    """In this process; prints a line of JSON."""
    from rankfold.from_disk import compress_from_disk
    from rankfold.from_disk.factors import FiledFactors

    seconds: dict[str, list[float]] = defaultdict(list)
    decompose = FiledFactors._decompose

    def timed(self: Any, module: Any, *rest: Any) -> None:
        start = time.perf_counter()
        decompose(self, module, *rest)
        seconds[str(tuple(module.weight.shape))].append(time.perf_counter() - start)

    FiledFactors._decompose = timed  # type: ignore[method-assign]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, TOKENS, (SEQUENCES, LENGTH), generator=generator)
    data = [{"input_ids": ids}] if on_data else None
    watched, start = Watched(), time.perf_counter()
    plan = compress_from_disk(
        source, target, params=params, data=data, layers="model.layers.*", force=True
    )
    facts = {
        "seconds": time.perf_counter() - start,
        "peak": watched.end(),
        "layers": dict(seconds),
        "parameters": [plan.before.parameters, plan.after.parameters],
        "factorized": len(plan.factorized),
    }
    print(json.dumps(facts))


def load(directory: Path) -> None:
    """In this process; prints a line of JSON."""
    import rankfold

    watched, start = Watched(), time.perf_counter()
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
            compress(Path(source), Path(rest[0]), params, on_data)
        return
    room = Path(tempfile.mkdtemp(dir=folder))
    try:
        source, small = room / "dense", room / "small"
        write_checkpoint(source, blocks)
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
        (
            f"{ALL_BLOCKS} blocks, by these times",
            f"{ALL_BLOCKS * per_block / 3600:.1f} h for their layers",
        ),
    ]
    on = ", ".join(f"{name} {value}" for name, value in facts["machine"].items())
    table = markdown_table((f"{facts['blocks']} of {ALL_BLOCKS} blocks", ""), rows)
    between_markers(DOCUMENT, "large model", f"{table}\nMeasured on: {on}.\n")


if __name__ == "__main__":
    typer.run(main)
