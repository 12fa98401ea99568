"""What is for people goes to the terminal, progress drawn only where there is one."""

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as ProgressBar

from rankfold.measure import Comparison
from rankfold.plan import Plan

T = TypeVar("T")

_LOG_WIDTH = 120  # where there is no terminal: room for the names of layers


def _width(stream: TextIO) -> int | None:
    """None: as wide as the terminal, or as the variable COLUMNS says."""
    return None if stream.isatty() or "COLUMNS" in os.environ else _LOG_WIDTH


people = Console(stderr=True, width=_width(sys.stderr))  # progress and errors
results = Console(width=_width(sys.stdout))  # quiet: nothing but errors, and what --json prints

_EVERY = 30.0  # seconds between lines where there is no terminal


def progress(work: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """The `rankfold.progress.Progress` that draws a bar on a terminal, and else a line at times."""
    if total is None and isinstance(work, Sized):
        total = len(work)
    if results.quiet or people.quiet:
        yield from work
        return
    if not people.is_terminal:
        yield from _lines(work, description, total)
        return
    bar = ProgressBar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=people,
        transient=True,
        refresh_per_second=2,  # drawing takes a core from what is being timed
    )
    with bar:
        yield from bar.track(work, total=total, description=description)


def _lines(work: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    """For logs: nothing of what is soon done, and no control characters."""
    start = said = time.monotonic()
    for done, one in enumerate(work):
        now = time.monotonic()
        if done and now - said >= _EVERY:
            left = "" if total is None else f" of {total}, about {_left(now - start, done, total)}"
            people.print(f"{description}: {done}{left}", highlight=False, soft_wrap=True)
            said = now
        yield one


def _left(seconds: float, done: int, total: int) -> str:
    left = max(0.0, seconds / done * (total - done))
    return f"{left:.0f} s left" if left < 120 else f"{left / 60:.0f} min left"


def print_json(comparison: Comparison, **more: Any) -> None:
    """The comparison, and more beside it, as one JSON object on standard output."""
    json.dump({**asdict(comparison), "speedup": comparison.speedup, **more}, sys.stdout, indent=1)
    sys.stdout.write("\n")


def print_plan(plan: Plan, out: Path, as_json: bool) -> None:
    """What was saved where: a table, or one JSON object on standard output."""
    if as_json:
        json.dump({"out": str(out), "plan": plan.to_json()}, sys.stdout, indent=1)
        sys.stdout.write("\n")
        return
    results.print(plan)
    results.print(f"saved to {out}")
