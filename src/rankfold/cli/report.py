"""`rankfold report`."""

from pathlib import Path
from typing import Annotated

import typer

from rankfold.checkpoint import read_plan_document, read_record
from rankfold.cli.console import results
from rankfold.report import write_report

REPORT = "report.html"


def report(
    directory: Annotated[Path, typer.Argument(help="A saved model.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="The file (default: report.html in there).")
    ] = None,
    title: Annotated[str | None, typer.Option("--title", help="What to call the network.")] = None,
) -> None:
    """Write the report of a saved model: one HTML file that needs nothing else.

    Before and after, every layer, other budgets and the commands for them, the recovery.
    """
    file = out or directory / REPORT
    origin = read_plan_document(directory)["origin"]
    named = {str(key): str(name) for key, name in origin.items()}
    name = title or directory.absolute().name
    write_report(read_record(directory), file, title=name, origin=named)
    results.print(f"report: {file}")
