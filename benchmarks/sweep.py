"""Every kind of model: what holds of a network when it is compressed, architecture by architecture.

Each case runs in a process of its own, within a time limit. Results are kept in sweep.json as they
come: what is there is not done again unless asked (`--again`). A table of all of them is written
into docs/architectures.md.
"""

import json
import multiprocessing
import os
import resource
import signal
from collections import Counter
from dataclasses import asdict
from fnmatch import fnmatchcase
from importlib import import_module
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from architectures import FAMILIES, of_family
from architectures.architecture import Architecture
from architectures.conformance import CHECKS, Outcome, examine
from race import between_markers, grouped, machine, markdown_table, save

HERE = Path(__file__).parent
RESULTS = HERE / "sweep.json"
DOCUMENT = HERE.parent / "docs" / "architectures.md"

app = typer.Typer(add_completion=False)


def run_alone(architecture: Architecture, seconds: float) -> Outcome:
    """One case in a process of its own, within so many seconds of the processor.

    Ten times as long by the clock: other work may hold it up.
    """
    context = multiprocessing.get_context("fork")  # what is imported here need not be there
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_tell, args=(architecture, theirs, round(seconds)))
    process.start()
    theirs.close()
    try:
        if ours.poll(10 * seconds):
            return cast(Outcome, ours.recv())
        return Outcome("failed", 10 * seconds, said=f"not done within {10 * seconds:g} s")
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGXCPU:
            return Outcome("failed", seconds, said=f"not done within {seconds:g} s")
        return Outcome("failed", said=f"the process ended with {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _tell(architecture: Architecture, pipe: Connection, seconds: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # exporters print
        os.dup2(silence, stream)
    pipe.send(examine(architecture))


def import_slow_packages() -> None:
    """What every case would spend seconds on."""
    for name in ("torch.export", "torch._dynamo", "torch.onnx", "accelerate", "scipy.optimize"):
        import_module(name)
    for name in ("onnxscript", "onnxruntime", "torchao", "transformers"):
        if find_spec(name) is not None:
            import_module(name)


def read_results() -> dict[str, Outcome]:
    """What is known so far, by architecture."""
    if not RESULTS.exists():
        return {}
    return {name: Outcome(**one) for name, one in json.loads(RESULTS.read_text())["cases"].items()}


def table_of(family: str, results: dict[str, Outcome]) -> str:
    """A row for each architecture of a family."""
    header = (
        *("architecture", "layers factorized", "parameters kept", "error before recovery"),
        *("saved, loaded", "exported", "ONNX", "seconds", "notes"),
    )
    rows = [
        _row(architecture, results[name])
        for name, architecture in of_family(family).items()
        if name in results and results[name].status != "not installed"
    ]
    return markdown_table(header, rows) if rows else "Not installed here.\n"


def _row(architecture: Architecture, outcome: Outcome) -> tuple[str, ...]:
    name = architecture.name
    if outcome.status == "refused":
        return (name, "refused", *[""] * 5, f"{outcome.seconds:.0f}", _in_a_cell(outcome.said))
    if not outcome.layers:
        return (name, "**failed**", *[""] * 5, f"{outcome.seconds:.0f}", _in_a_cell(outcome.said))
    kept = outcome.after / outcome.before
    notes = [f"{times} left: {reason}" for reason, times in outcome.reasons.items()]
    if outcome.least is not None:
        notes.insert(0, "the least that can be reached")
    notes += [f"**{failure}**" for failure in outcome.failures]
    return (
        name,
        f"{outcome.factorized} of {outcome.layers}",
        f"{100 * kept:.0f} % of {grouped(outcome.before)}",
        "" if outcome.error is None else f"{outcome.error:.2g}",
        *(_sign(outcome.checks.get(one, "")) for one in ("loaded", "exported", "ONNX")),
        f"{outcome.seconds:.0f}",
        _in_a_cell("; ".join(notes)),
    )


def _sign(said: str) -> str:
    return {"yes": "same", "no": "**no**"}.get(said.partition(":")[0], "-")


def _in_a_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def summary_of(results: dict[str, Outcome]) -> str:
    """How many cases there are, and how they did."""
    count = Counter(outcome.status for outcome in results.values())
    tried = len(results) - count["not installed"]
    held = Counter(
        (name, said.partition(":")[0])
        for one in results.values()
        for name, said in one.checks.items()
    )
    names = ["original untouched", *CHECKS]
    rows = [(name, *(str(held[name, said]) for said in ("yes", "-", "no"))) for name in names]
    missing = Counter(one.said for one in results.values() if one.status == "not installed")
    absent = "".join(
        f" {said[0].upper()}{said[1:]}: {n} cases left out." for said, n in missing.items()
    )
    return (
        f"{tried} architectures: {count['passed']} passed everything, {count['refused']} were "
        f"refused with a typed error as they should be, {count['failed']} failed.{absent}\n\n"
        + markdown_table(("check", "holds", "does not apply", "fails"), rows)
    )


def write_document(results: dict[str, Outcome]) -> None:
    """The tables of docs/architectures.md."""
    between_markers(DOCUMENT, "summary", summary_of(results))
    for family in FAMILIES:
        between_markers(DOCUMENT, family, table_of(family, results))


@app.command()
def main(
    only: Annotated[str, typer.Option(help="A pattern of names of architectures.")] = "*",
    family: Annotated[str, typer.Option(help="A pattern of families.")] = "*",
    again: Annotated[bool, typer.Option(help="Also what is done already.")] = False,
    failed: Annotated[bool, typer.Option(help="Also what failed.")] = False,
    limit: Annotated[float, typer.Option(help="Seconds for a case.")] = 300,
) -> None:
    torch.set_num_threads(1)
    import_slow_packages()
    results = read_results()
    wanted = [
        architecture
        for name in FAMILIES
        if fnmatchcase(name, family)
        for architecture in of_family(name).values()
        if fnmatchcase(architecture.name, only)
    ]
    for architecture in wanted:
        known = results.get(architecture.name)
        done = known is not None and known.status != "not installed"
        if done and not again and not (failed and known.status == "failed"):
            continue
        outcome = (
            run_alone(architecture, limit)
            if architecture.is_installed
            else Outcome("not installed", said=f"{architecture.package} is not installed")
        )
        results = {**read_results(), architecture.name: outcome}  # others may have written
        _keep(results)
        print(f"{outcome.status:13} {outcome.seconds:6.1f} s  {architecture.name}", flush=True)
        for failure in outcome.failures:
            print(f"              {failure}", flush=True)
    write_document(read_results())


def _keep(results: dict[str, Outcome]) -> None:
    order = [name for family in FAMILIES for name in of_family(family)]
    facts: dict[str, Any] = {name: asdict(results[name]) for name in order if name in results}
    save(RESULTS, {"machine of the last case": machine(), "cases": facts})


if __name__ == "__main__":
    app()
