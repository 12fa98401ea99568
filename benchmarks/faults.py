"""A real `rankfold compress`, killed at random times and started again until it is done.

    python benchmarks/faults.py                    100 kills, on a network of seconds
    python benchmarks/faults.py --network demo --kills 12
    python benchmarks/faults.py --disk             on a disk that is full, and larger each time

A disk is mounted in memory, which takes root.

Each result is compared with that of a run that nobody killed: weights bit for bit, and all that is
said of them but times. Writes benchmarks/faults.json and the table in docs/faults.md.
"""

import argparse
import collections
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from race import between_markers, machine, markdown_table, save

HERE = Path(__file__).parent
RESULTS, DOCUMENT = HERE / "faults.json", HERE.parent / "docs" / "faults.md"
NETWORKS = {
    "signals": [
        *("faults:make_model", "--data", "faults:make_data", "--macs", "0.4", "--epochs", "4"),
    ],
    "demo": [
        *("rankfold.demo:make_model", "--data", "rankfold.demo:make_data"),
        *("--test", "rankfold.demo:make_test", "--metric", "rankfold.demo:accuracy"),
        *("--macs", "0.25", "--epochs", "6"),
    ],
}
FIRST_SIZE = 64  # KiB of a disk
PHASES = {
    "analysis/parts/layer": "a layer's decompositions",
    "analysis/parts/statistics": "statistics",
    "analysis/parts/fit": "a layer's fit in a metric",
    "analysis/parts/trial": "a trial of a metric",
    "analysis/parts/check": "a layer's checks",
    "analysis/whole": "the analysis put together",
    "factors/": "a layer's factors",
    "network/factorized": "the factorized network",
    "network/training": "an epoch of recovery",
    "network/recovered": "the recovered network",
    "network/comparison": "the comparison",
    "placed/": "saving and checking",
    "done": "clearing up",
}


def make_model() -> Any:
    """Two 1-D convolutions and three linear layers: no choice in it is left to the clock."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(8, 32, 5, padding=2),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Conv1d(32, 48, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(4),
        nn.Flatten(),
        nn.Linear(48 * 4, 96),
        nn.ReLU(),
        nn.Linear(96, 96),
        nn.ReLU(),
        nn.Linear(96, 10),
    ).eval()


def make_data() -> list[Any]:
    import torch

    generator = torch.Generator().manual_seed(1)
    return list(torch.randn(640, 8, 64, generator=generator).split(16))


def child(log: Path, arguments: list[str]) -> None:
    """The command line itself; what the journal gets is noted with the time, in a file."""
    from rankfold import compress, journal
    from rankfold.cli import main
    from rankfold.recover import recover

    def note(what: str) -> None:
        with open(log, "a") as file:
            file.write(f"{time.time()} {what}\n")

    keep, begin, write, save = (
        *(journal.Journal._write, journal.Journal.begin),
        *(recover.__globals__["write"], compress.__globals__["save"]),
    )

    def noted_keep(self: Any, name: str, *rest: Any) -> None:
        keep(self, name, *rest)
        note(f"kept {name}")

    def noted_begin(self: Any, *rest: Any, **named: Any) -> None:
        begin(self, *rest, **named)
        note("begun")

    def noted_write(path: Path, *rest: Any) -> None:
        write(path, *rest)
        note(f"kept network/{path.name}")

    def noted_save(model: Any, path: Path, **named: Any) -> None:
        save(model, path, **named)
        note(f"kept network/{path.name}")

    journal.Journal._write, journal.Journal.begin = noted_keep, noted_begin
    recover.__globals__["write"], compress.__globals__["save"] = noted_write, noted_save
    sys.argv = ["rankfold", *arguments]
    note("started")
    try:
        main()
    finally:
        note("kept done")


class Run:
    """The command in a process of its own, forked from this one, which has imported everything."""

    def __init__(self, room: Path, out: str, network: str, place: Path | None = None) -> None:
        """What it says goes to the room, what it makes there too or to another place."""
        self.seconds = 0.0  # of processors, when it has ended: others work on the machine too
        arguments = ["compress", *NETWORKS[network], "--threads", "1", "--out", out]
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.chdir(place or room)
                output = os.open(room / f"{out}.output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(output, 1)
                os.dup2(output, 2)
                child(room / f"{out}.log", arguments)
            except SystemExit as end:
                status = int(end.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)

    def wait(self, seconds: float = 1e9) -> int | None:
        """Its exit status; None if it is still at work after so many seconds."""
        until = time.time() + seconds
        while time.time() < until:
            pid, status, used = os.wait4(self.pid, os.WNOHANG)
            if pid:
                self.seconds = used.ru_utime + used.ru_stime
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        return None

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        _, _, used = os.wait4(self.pid, 0)
        self.seconds = used.ru_utime + used.ru_stime


def events(log: Path) -> list[tuple[float, str]]:
    lines = log.read_text().splitlines() if log.exists() else []
    pairs = [line.split(" ", 1) for line in lines if line.count(" ")]
    return [(float(when), what) for when, what in pairs]


def phase_of(what: str) -> str:
    name = what.removeprefix("kept ")
    return next((told for key, told in PHASES.items() if name.startswith(key)), name)


def result(directory: Path) -> tuple[bytes, Any]:
    """The weights, and what is said of them but times."""
    document = json.loads((directory / "plan.json").read_text())
    for side in ("before", "after"):
        document["comparison"][side].pop("latency_ms")
    document["recovery"].pop("seconds")
    return (directory / "model.safetensors").read_bytes(), document


def uninterrupted(room: Path, network: str) -> tuple[list[tuple[float, str]], float, Any]:
    """What it noted, its seconds of processors, its result."""
    run = Run(room, "whole", network)
    if run.wait():
        raise RuntimeError((room / "whole.output").read_text()[-3000:])
    return events(room / "whole.log"), run.seconds, result(room / "whole")


def killed(room: Path, network: str, kills: int, seed: int) -> dict[str, Any]:
    """Kill until so many kills are done, a new result being begun whenever one is there."""
    began = time.time()
    noted, work, expected = uninterrupted(room, network)
    length = noted[-1][0] - noted[0][0]
    draw = random.Random(seed)
    phases: collections.Counter[str] = collections.Counter()
    same, repeated, done = 0, 0.0, 0
    while done < kills:
        shutil.rmtree(room / "small", ignore_errors=True)
        (room / "small.log").unlink(missing_ok=True)
        spent = 0.0
        here: list[int] = []  # events known when a kill came
        while True:
            before = len(events(room / "small.log"))
            run = Run(room, "small", network)
            status = run.wait(draw.random() * length if done < kills else 1e9)
            if status is None:
                run.kill()
                done += 1
                spent += run.seconds
                now = events(room / "small.log")
                here.append(len(now) if any(w == "begun" for _, w in now[before:]) else -1)
                if (room / "small").exists():
                    result(room / "small")  # whole, or an error
                continue
            # Of the last process nothing was left to do but to end.
            if status and not (room / "small").exists():
                raise RuntimeError((room / "small.output").read_text()[-3000:])
            break
        now = events(room / "small.log")
        spent += run.seconds
        for place in here:
            following = [what for _, what in now[place:] if what.startswith("kept")]
            phases["starting" if place < 0 else phase_of([*following, "kept done"][0])] += 1
        repeated += spent - work
        if result(room / "small") != expected:
            raise AssertionError(f"another result after {len(here)} kills")
        same += 1
        print(f"{done} kills, {same} results, {time.time() - began:.0f} s", flush=True)
    left = [path.name for path in room.iterdir() if path.name.startswith(".")]
    if left:
        raise AssertionError(f"left behind: {left}")
    return {
        "kills": done,
        "results": same,
        "entries": sum(what.startswith("kept") for _, what in noted),
        "work_seconds": round(work, 2),
        "repeated_share_of_a_kill": round(repeated / done / work, 4),
        "phases": dict(phases.most_common()),
    }


def on_a_full_disk(room: Path, network: str) -> dict[str, Any]:
    """A disk a quarter larger each time that it was full, until the command comes to its end."""
    _, _, expected = uninterrupted(room, network)
    disk, size, full = room / "disk", FIRST_SIZE, 0
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", disk], check=True)
    try:
        while Run(room, "small", network, disk).wait():
            told = (room / "small.output").read_text().splitlines()[-1]
            if "No space left on device" not in told or not told.startswith("error:"):
                raise AssertionError(f"on a full disk of {size} KiB it says: {told}")
            full += 1
            size = size * 5 // 4
            subprocess.run(["mount", "-o", f"remount,size={size}k", disk], check=True)
        if result(disk / "small") != expected:
            raise AssertionError("another result")
        left = [path.name for path in disk.iterdir() if path.name.startswith(".")]
        if left:
            raise AssertionError(f"left behind: {left}")
    finally:
        subprocess.run(["umount", disk], check=True)
    return {"full": full, "kibibytes": [FIRST_SIZE, size]}


def disk_told(found: dict[str, Any]) -> str:
    first, last = found["kibibytes"]
    return (
        f"On a disk of {first} KiB, made a quarter larger each time, the same command ended "
        f"{found['full']} times with the error that no space is left, and at {last} KiB with the "
        "result, the same again; nothing was left behind.\n"
    )


def table(found: dict[str, Any]) -> str:
    """By phase the kills that hit it, and what a kill cost."""
    names = [name for name in NETWORKS if name in found]
    rows = [
        (phase, *(str(found[name]["phases"].get(phase, 0)) for name in names))
        for phase in ("starting", *PHASES.values())
        if any(phase in found[name]["phases"] for name in names)
    ]
    for what, key in (
        ("**kills**", "kills"),
        ("results, all the same", "results"),
        ("entries of a journal", "entries"),
    ):
        rows.append((what, *(str(found[name][key]) for name in names)))
    shares = (found[name]["repeated_share_of_a_kill"] for name in names)
    rows.append(("work of a run done again for a kill", *(f"{100 * one:.1f} %" for one in shares)))
    return markdown_table(("killed in", *names), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=NETWORKS, default="signals")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--disk", action="store_true")
    asked = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    import plotly.graph_objects
    import torch

    import rankfold.cli

    assert plotly.graph_objects and rankfold.cli
    torch.set_num_threads(1)
    sys.path.insert(0, str(HERE))
    # What is imported when it is needed, is imported now.
    rankfold.compress(make_model(), make_data()[:4], macs=0.4, epochs=1)
    with tempfile.TemporaryDirectory() as room:
        if asked.disk:
            found["disk"] = on_a_full_disk(Path(room), asked.network)
        else:
            found[asked.network] = killed(Path(room), asked.network, asked.kills, asked.seed)
    found["machine"] = machine()
    save(RESULTS, found)
    between_markers(DOCUMENT, "kills", table(found))
    if "disk" in found:
        between_markers(DOCUMENT, "disk", disk_told(found["disk"]))
    print(json.dumps(found["disk" if asked.disk else asked.network], indent=1))


if __name__ == "__main__":
    main()
