"""`rankfold evaluate`."""

from pathlib import Path
from typing import Annotated

import typer

from rankfold.batches import first_batches
from rankfold.checkpoint import load
from rankfold.cli.console import people, print_json, progress, results
from rankfold.cli.inputs import load_functions, load_inputs, origin_of, prepare, remembered
from rankfold.cli.options import Device, Json, Seed, Threads, Trust
from rankfold.measure import in_fastest_memory_format, measure


def evaluate(
    directory: Annotated[Path, typer.Argument(help="A saved model.")],
    model: Annotated[
        str | None,
        typer.Option("--model", help="As for compress (with --trust: what was used then)."),
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help="Likewise.")] = None,
    text: Annotated[str | None, typer.Option("--text", help="Likewise.")] = None,
    metric: Annotated[str | None, typer.Option("--metric", help="Likewise.")] = None,
    forward: Annotated[str | None, typer.Option("--forward", help="Likewise.")] = None,
    trust: Trust = False,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Load a saved model and measure it against the original.

    The import paths given to compress are remembered in the directory. With --trust they are used
    again, so that code that they name is run; without, for a directory from someone else, give
    --model and --data.
    """
    origin = origin_of(directory, trust)
    model, data, text = remembered(directory, origin, model, data, text)
    place = prepare(device, threads, seed)
    people.print(f"model {model}, data {data or text}", highlight=False)
    network, batches, _ = load_inputs(model, data, text, None, place)
    run_forward, measured = load_functions(
        forward or origin.get("forward"), metric or origin.get("metric")
    )
    small = load(directory, network)
    batch = next(first_batches(batches, 1, place))
    comparison = measure(
        in_fastest_memory_format(network, batch, run_forward, progress),
        small,
        batches,
        metric=measured,
        forward=run_forward,
        progress=progress,
    )
    if as_json:
        print_json(comparison)
    else:
        results.print(comparison)
