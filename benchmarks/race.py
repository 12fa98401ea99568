"""Races: the same work by several libraries, taking turns; the median time and error of each."""

import gc
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Runner:
    name: str
    run: Callable[[], Any]
    error: Callable[[Any], float]
    rounds: int = 5


@dataclass(frozen=True)
class Finish:
    name: str
    seconds: float  # the median of the rounds
    error: float  # relative Frobenius error, of the last round
    rounds: int


@dataclass(frozen=True)
class Race:
    work: str
    asked: str
    finishes: tuple[Finish, ...]  # the first is rankfold's
    remark: str = ""

    def rows(self) -> list[tuple[str, ...]]:
        """Work, who, seconds, error, how many times rankfold's time, what was asked."""
        ours, *peers = self.finishes
        rows = [(self.work, ours.name, _seconds(ours.seconds), f"{ours.error:.4g}", "", self.asked)]
        for peer in peers:
            ratio = f"{peer.seconds / ours.seconds:.1f}x"
            error = "" if math.isnan(peer.error) else f"{peer.error:.4g}"
            rows.append(("", peer.name, _seconds(peer.seconds), error, ratio, ""))
        return rows


def run_race(work: str, asked: str, runners: Sequence[Runner], remark: str = "") -> Race:
    """Each runs once to warm up, those of one round excepted, and then in turn."""
    times: dict[str, list[float]] = {runner.name: [] for runner in runners}
    errors: dict[str, float] = {}
    for turn in range(-1, max(runner.rounds for runner in runners)):
        for runner in runners if turn % 2 == 0 else reversed(runners):
            if turn >= runner.rounds or (turn < 0 and runner.rounds == 1):
                continue
            seconds, result = timed(runner.run)
            if turn >= 0:
                times[runner.name].append(seconds)
            if turn == runner.rounds - 1:
                errors[runner.name] = runner.error(result)
    finishes = tuple(
        Finish(
            runner.name, statistics.median(times[runner.name]), errors[runner.name], runner.rounds
        )
        for runner in runners
    )
    return Race(work, asked, finishes, remark)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that a call takes, and what it returns."""
    gc.collect()
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def machine() -> dict[str, str]:
    """What the figures depend on."""
    packages = (
        "rankfold",
        "torch",
        "tensorly",
        "tensorly-torch",
        "torchTT",
        "tntorch",
        "scikit-learn",
        "numpy",
    )
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "processor": _processor(),
        **gpu,
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
    }


def save(path: Path, facts: dict[str, Any]) -> None:
    path.write_text(json.dumps(facts, indent=1, default=asdict) + "\n")


def between_markers(path: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- end of name -->` in a document."""
    document = path.read_text()
    start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    head, _, rest = document.partition(start)
    _, marker, tail = rest.partition(end)
    if not marker:
        raise ValueError(f"{path} has no markers {start.strip()} and {end}")
    path.write_text(f"{head}{start}\n{text}\n{end}{tail}")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _seconds(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.3g} s"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def mean_of_seeds(shares: Sequence[float]) -> str:
    """In percent, with the standard deviation if there are several."""
    percent = [100 * share for share in shares]
    spread = f" ± {statistics.stdev(percent):.2f}" if len(percent) > 1 else ""
    return f"{statistics.mean(percent):.2f}{spread} %"


def grouped(number: int) -> str:
    """With spaces between thousands."""
    return f"{number:,}".replace(",", " ")
