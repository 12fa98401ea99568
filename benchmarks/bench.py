"""The suite: rankfold beside what users would pick instead, network by network.

Every contender gets the same data, the same recovery and the same clock, in a process of its own.
Rows are appended to bench.jsonl with date, commit, machine and versions; `docs/results.md` and a
table of the README are made from it. `--quick` is one network, one share and one epoch of recovery,
shown and not written. AIMET runs from an environment of its own, in which the rest need not be.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from suite import cases, contenders
from suite.results import of_latest_processor, read, table, write_document, write_readme
from suite.trial import Trial, tried

HERE = Path(__file__).parent
RESULTS = HERE / "bench.jsonl"
DOCUMENT = HERE.parent / "docs" / "results.md"
README = HERE.parent / "README.md"
SLOW = ("cp_tutorial",)  # minutes: not among the quick ones
QUICK = [Trial("demo", name, (0.33,), epochs=1) for name in contenders.NAMES if name not in SLOW]


def main(
    case: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(cases.NAMES)}")] = None,
    contender: Annotated[
        list[str] | None, typer.Option(help=f"of {', '.join(contenders.NAMES)}")
    ] = None,
    quick: Annotated[bool, typer.Option(help="one network and one share")] = False,
    again: Annotated[bool, typer.Option(help="also what was measured at this commit")] = False,
    only_write: Annotated[bool, typer.Option(help="the documents, from what there is")] = False,
    threads: int = 2,
    minutes: Annotated[float, typer.Option(help="that one contender may take")] = 30,
    trial: Annotated[str | None, typer.Option(hidden=True)] = None,
    rows: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    if trial is not None and rows is not None:
        for row in tried(Trial(**json.loads(trial)), threads):
            append(row, rows)
        return
    if only_write:
        write()
        return
    if quick:
        found = [row for one in QUICK for row in in_process_of_its_own(one, threads, minutes)]
        print(table([row for row in found if "factorized" in row]))
        print(*(f"{row['contender']}: {row['why not']}" for row in found if "why not" in row))
        return
    done = {
        (row["case"], row["contender"], row["share"])
        for row in read(RESULTS)
        if row["commit"] == commit() and not again
    }
    competing = {name: contenders.find(name) for name in contender or contenders.NAMES}
    for name, one in competing.items():
        if isinstance(one, str):
            print(f"{name} is left out: {one}")
    for one in every_trial(case or cases.NAMES, competing):
        if not all((one.case, one.contender, share) in done for share in one.shares):
            about = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit()}
            for row in in_process_of_its_own(one, threads, minutes):
                print(json.dumps(row), flush=True)
                append(about | row, RESULTS)
    write()


def write() -> None:
    """Both documents."""
    rows = of_latest_processor(read(RESULTS))
    write_document(rows, DOCUMENT)
    write_readme(rows, README)


def every_trial(
    names: Sequence[str], competing: Mapping[str, contenders.Contender | str]
) -> list[Trial]:
    """Of those that are installed."""
    return [
        Trial(name, contender, one.shares or cases.shares(name, one.of_time))
        for name in names
        for contender, one in competing.items()
        if not isinstance(one, str)
    ]


def in_process_of_its_own(trial: Trial, threads: int, minutes: float) -> list[dict]:
    """What was measured at each share, or why the trial ended."""
    with TemporaryDirectory() as folder:  # what a contender writes is gone with it
        rows = Path(folder, "rows.jsonl")
        command = [sys.executable, __file__, "--trial", json.dumps(asdict(trial))]
        command += ["--rows", str(rows), "--threads", str(threads)]
        try:
            told = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=60 * minutes
            )
            line = (told.stderr.strip() or "no word").splitlines()[-1]
            ended = f"it fails: {line:.200}"
        except subprocess.TimeoutExpired:
            ended = f"not done after {minutes:.0f} minutes"
        found = read(rows)
    missing = [share for share in trial.shares if share not in {row["share"] for row in found}]
    return found + [{**trial.about(share), "why not": ended} for share in missing]


@cache
def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True).stdout.strip()


def append(row: dict, path: Path) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    typer.run(main)
