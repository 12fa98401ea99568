"""`rankfold demo`."""

from pathlib import Path
from typing import Annotated

import typer

from rankfold.cli.compress import compress
from rankfold.cli.options import Device, Epochs, Force, Json, Out, Seed, Threads


def demo(
    context: typer.Context,
    out: Out = Path("rankfold-demo"),
    macs: Annotated[float, typer.Option("--macs", help="Fraction of MACs kept.")] = 0.25,
    epochs: Epochs = 6,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Compress the network that ships with rankfold, save it, load it again and evaluate that."""
    compress(
        context,
        model="rankfold.demo:make_model",
        data="rankfold.demo:make_data",
        test="rankfold.demo:make_test",
        metric="rankfold.demo:accuracy",
        out=out,
        macs=macs,
        epochs=epochs,
        seed=seed,
        device=device,
        threads=threads,
        as_json=as_json,
        force=force,
    )
