"""`rankfold from-disk`."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from rankfold.analysis import Overrides
from rankfold.cli.console import print_plan, progress
from rankfold.cli.options import Force, Json, Keep, Layers, Macs, Memory, Out, Params, Threads
from rankfold.from_disk import compress_from_disk
from rankfold.imports import resolve_text


def from_disk(
    directory: Annotated[Path, typer.Argument(help="Of a model of transformers: safetensors.")],
    out: Out,
    text: Annotated[
        str | None, typer.Option("--text", help="Plain text that it is run on, once.")
    ] = None,
    params: Params = None,
    macs: Macs = None,
    memory: Memory = None,
    layers: Layers = None,
    keep: Keep = None,
    sequences: Annotated[
        int, typer.Option("--sequences", min=1, help="Batches of the text to use.")
    ] = 2,
    shard: Annotated[
        int, typer.Option("--shard", min=1, help="Bytes of one file of the result, about.")
    ] = 2**29,
    threads: Threads = None,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Factorize the linear layers of a model too large for memory, one at a time.

    Without --text by their weights alone; with it in the metric of what they are given when the
    model reads the text. Interrupted, the same command goes on where it was. Nothing is recovered.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    plan = compress_from_disk(
        directory,
        out,
        params=params,
        macs=macs,
        memory=memory,
        data=None if text is None else resolve_text(text, str(directory)),
        batches=sequences,
        layers=layers or "*",
        overrides=Overrides(keep=keep or ()),
        shard_bytes=shard,
        force=force,
        progress=progress,
    )
    print_plan(plan, out, as_json)
