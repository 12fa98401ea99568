"""All commands together, and how they end."""

import sys

import typer

from rankfold.cli.compress import compress
from rankfold.cli.console import people
from rankfold.cli.demo import demo
from rankfold.cli.evaluate import evaluate
from rankfold.cli.export import export_model
from rankfold.cli.inspect import inspect
from rankfold.cli.report import report
from rankfold.cli.slice import slice_model
from rankfold.errors import RankfoldError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Make trained PyTorch networks smaller and measurably faster by factorization.",
)
app.command()(demo)
app.command()(inspect)
app.command()(compress)
app.command(name="slice")(slice_model)
app.command()(evaluate)
app.command()(report)
app.command(name="export")(export_model)


def main() -> None:
    """Entry point: typed errors become one line on standard error and exit status 2."""
    try:
        app()
    except RankfoldError as error:
        line = " ".join(str(error).split())
        people.print(f"error: {line}", style="red", highlight=False, soft_wrap=True, markup=False)
        sys.exit(2)
