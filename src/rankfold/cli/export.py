"""`rankfold export`."""

import json
import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from rankfold.batches import first_batches
from rankfold.checkpoint import load
from rankfold.cli.console import results
from rankfold.cli.inputs import load_functions, load_inputs, origin_of, prepare, remembered
from rankfold.cli.options import ForwardPath, Json, MetricPath, Threads, Trust
from rankfold.export import Axes, Format, export, write_source


class FormatName(StrEnum):
    """Of the file, and of who reads it."""

    onnx = "onnx"
    openvino = "openvino"
    torch = "torch"
    executorch = "executorch"
    python = "python"


FORMATS: dict[FormatName, Format] = {
    FormatName.onnx: "onnx",
    FormatName.openvino: "openvino",
    FormatName.torch: "torch",
    FormatName.executorch: "executorch",
}


class AxesName(StrEnum):
    """Of the inputs, that may have other lengths."""

    batch = "batch"
    all = "all"
    none = "none"


AXES: dict[AxesName, Axes | None] = {
    AxesName.batch: "batch",
    AxesName.all: "all",
    AxesName.none: None,
}


def export_model(
    directory: Annotated[Path, typer.Argument(help="A saved model.")],
    out: Annotated[Path, typer.Argument(help="The file: .onnx, .xml, .pt2, .pte; or a directory.")],
    to: Annotated[
        FormatName | None,
        typer.Option("--to", help="Format (default: what the file's suffix says)."),
    ] = None,
    dynamic: Annotated[
        AxesName, typer.Option("--dynamic", help="Axes of inputs that may have other lengths.")
    ] = AxesName.batch,
    fold: Annotated[
        bool, typer.Option("--fold/--no-fold", help="Batch norms into the layers beside them.")
    ] = True,
    model: Annotated[
        str | None,
        typer.Option("--model", help="As for compress (with --trust: what was used then)."),
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help="Likewise.")] = None,
    text: Annotated[str | None, typer.Option("--text", help="Likewise.")] = None,
    metric: MetricPath = None,
    forward: ForwardPath = None,
    trust: Trust = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Write a saved model for another program, run the file there, and compare.

    Files of ONNX Runtime (.onnx), OpenVINO (.xml), torch.export (.pt2) and ExecuTorch (.pte) need
    no rankfold. Python (a directory) is a readable file that builds the network of torch's own
    layers, and its weights. With --trust the import paths given to compress are used again.
    """
    origin = origin_of(directory, trust)
    named = remembered(directory, origin, model, data, text)
    place = prepare("cpu", threads, 0)
    network, batches, _ = load_inputs(*named, None, place)
    small = load(directory, network)
    if to is FormatName.python or (to is None and not out.suffix):
        path = write_source(small, network, out)
        if as_json:
            json.dump({"path": str(path)}, sys.stdout)
            sys.stdout.write("\n")
        else:
            results.print(f"{path} builds the network: it needs torch and safetensors alone")
        return
    run_forward, measured = load_functions(
        forward or origin.get("forward"), metric or origin.get("metric")
    )
    done = export(
        small,
        out,
        next(first_batches(batches, 1, place)),
        to=None if to is None else FORMATS[to],
        dynamic=AXES[dynamic],
        fold=fold,
        data=batches if measured else None,
        metric=measured,
        forward=run_forward,
    )
    if as_json:
        json.dump({**asdict(done), "path": str(done.path)}, sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        results.print(done)
