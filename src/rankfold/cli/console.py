"""What is for people goes to the terminal, progress drawn only where there is one."""

import json
import sys
from collections.abc import Iterable, Iterator, Sized
from dataclasses import asdict
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar

from rankfold.measure import Comparison

T = TypeVar("T")

people = Console(stderr=True)


def progress(work: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """The `rankfold.progress.Progress` that draws a bar, on a terminal."""
    if total is None and isinstance(work, Sized):
        total = len(work)
    bar = ProgressBar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=people,
        transient=True,
        disable=not people.is_terminal,
        refresh_per_second=2,  # drawing takes a core from what is being timed
    )
    with bar:
        yield from bar.track(work, total=total, description=description)


def print_json(comparison: Comparison, **more: Any) -> None:
    """The comparison, and more beside it, as one JSON object on standard output."""
    json.dump({**asdict(comparison), "speedup": comparison.speedup, **more}, sys.stdout, indent=1)
    sys.stdout.write("\n")
