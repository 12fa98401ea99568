"""All commands together, and how they end."""

import sys
from typing import Annotated

import typer

from rankfold.cli.compress import compress
from rankfold.cli.console import people, results
from rankfold.cli.demo import demo
from rankfold.cli.evaluate import evaluate
from rankfold.cli.export import export_model
from rankfold.cli.from_disk import from_disk
from rankfold.cli.inspect import inspect
from rankfold.cli.report import report
from rankfold.cli.slice import slice_model
from rankfold.errors import RankfoldError
from rankfold.version import __version__

_HELP = """Make trained PyTorch networks smaller and measurably faster by factorization.

Try it on the network that ships with rankfold:

    rankfold demo

Then yours, by the import paths of a function that makes it and of one that makes batches:

    rankfold inspect my.code:make_model --data my.code:make_data --macs 0.3

    rankfold compress my.code:make_model --data my.code:make_data --latency 0.5 --out small

    rankfold export small small.onnx --trust

Budgets are what is kept. Each command explains itself: rankfold compress --help.
"""

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


def _say_version(wanted: bool) -> None:
    if wanted:
        results.print(f"rankfold {__version__}", highlight=False)
        raise typer.Exit


@app.callback(help=_HELP)
def every_command(
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print nothing but errors and --json.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Say it.")
    ] = False,
) -> None:
    results.quiet = quiet


app.command()(demo)
app.command()(inspect)
app.command()(compress)
app.command(name="from-disk")(from_disk)
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
