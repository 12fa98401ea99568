"""`rankfold slice`."""

from pathlib import Path
from typing import Annotated

import typer

from rankfold.batches import device_of, first_batches
from rankfold.checkpoint import check_target, load, read_plan_document, save
from rankfold.cli.console import print_plan
from rankfold.cli.inputs import origin_of
from rankfold.cli.options import Force, Json, Latency, Macs, Memory, Out, Params, Trust
from rankfold.deployment import merge_adjacent
from rankfold.elastic import slice_to
from rankfold.errors import BudgetError, CheckpointError
from rankfold.imports import resolve_data, resolve_model
from rankfold.record import record_of


def slice_model(
    directory: Annotated[Path, typer.Argument(help="A saved model, of compress --elastic.")],
    out: Out,
    params: Params = None,
    macs: Macs = None,
    memory: Memory = None,
    latency: Latency = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="As for compress (with --trust: what was used then)."),
    ] = None,
    merge_with: Annotated[
        str | None,
        typer.Option("--merge", help="Import path of batches to find what can be merged."),
    ] = None,
    trust: Trust = False,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Cut a smaller network out of an elastic one, at once and without data.

    With --trust the import path of the model that is remembered in the directory is used again.
    """
    check_target(out, force)
    model = model or origin_of(directory, trust).get("model")
    if model is None:
        raise CheckpointError(
            f"{directory} does not say its model, or is not trusted to: give --model, or --trust"
        )
    asked = {"params": params, "macs": macs, "memory": memory, "latency": latency}
    budget = {name: value for name, value in asked.items() if value is not None}
    if not budget:
        raise BudgetError("say what to slice to: --params, --macs, --memory or --latency")
    network = resolve_model(model).eval()
    small = slice_to(load(directory, network), **budget)
    if merge_with is not None:
        batch = next(first_batches(resolve_data(merge_with), 1, device_of(small)))
        small = merge_adjacent(small, batch)
    origin = {**read_plan_document(directory)["origin"], "model": model}
    save(small, out, force=force, origin=origin)
    print_plan(record_of(small).plan, out, as_json)
