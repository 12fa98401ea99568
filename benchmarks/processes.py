"""The work shared out: seconds of each part with one process and several, on one host and on two.

    python benchmarks/processes.py                 one process, then two, of one thread each
    python benchmarks/processes.py --step hosts    two hosts: network namespaces joined by a cable
    python benchmarks/processes.py --step show     the tables again

Every process does the same: analyze the demo's network, plan it for 30 % of its MACs, factorize it
and recover it for an epoch. Of the run with one process each piece that can be given to another is
timed; from these follows what many workers would take (`predicted`), and the run with two says
whether that is so. Hosts need root, and `ip`. Writes benchmarks/processes.json and the tables of
docs/processes.md.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from race import between_markers, machine, markdown_table, save

T = TypeVar("T")

HERE = Path(__file__).parent
RESULTS, DOCUMENT = HERE / "processes.json", HERE.parent / "docs" / "processes.md"
MACS = 0.3
BATCHES = 50  # of 50 images, in recovery
WORKERS = (1, 2, 4, 8, 16, 32, 64)
# Of the network between hosts: bits a second, and seconds for a message to arrive.
RATE, DELAY = 1e9, 2e-4
HOSTS = ("rankfold-a", "rankfold-b")
ADDRESSES = ("10.77.7.1", "10.77.7.2")


class Pieces:
    """Progress that times what is between the items, and adds up the rest of the time."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def __call__(
        self, work: Iterable[T], description: str, total: int | None = None
    ) -> Iterator[T]:
        found = self.seconds.setdefault(description.split(",")[0], [])
        for item in work:
            start = time.perf_counter()
            yield item
            found.append(time.perf_counter() - start)


def work(out: Path) -> None:
    """What each process does."""
    import torch

    import rankfold
    from rankfold import demo, processes

    torch.set_num_threads(1)
    processes.join(torch.device("cpu"))
    model, data = demo.make_model(), demo.make_data()
    stages: dict[str, Any] = {}

    def stage(name: str, call: Any) -> Any:
        processes.gathered(None)  # all begin together
        pieces, start = Pieces(), time.perf_counter()
        result = call(pieces)
        stages[name] = {"seconds": time.perf_counter() - start, "pieces": pieces.seconds}
        return result

    analysis = stage("analyze", lambda p: rankfold.analyze(model, data, progress=p))
    plan = stage("plan", lambda p: analysis.plan(macs=MACS))
    small = stage("factorize", lambda p: rankfold.factorize(model, plan, progress=p))
    taught = {"teacher": model, "epochs": 1, "accumulation": 2 // processes.count()}
    stage("recover", lambda p: rankfold.recover(small, data[:BATCHES], progress=p, **taught))
    moments = sum(
        moment.numel()
        for layer in analysis.layers
        for moment in (layer.moments.inputs, layer.moments.gradients)
        if moment is not None
    )
    weights = sum(parameter.numel() for parameter in small.parameters())
    ranks = {entry.name: [entry.method, entry.rank] for entry in plan.factorized}
    if processes.is_first():
        facts = {"stages": stages, "ranks": ranks, "moments": moments, "weights": weights}
        out.write_text(json.dumps(facts))


def launch(out: Path, count: int, arguments: tuple[str, ...] = ("--standalone",)) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    return [
        *command,
        *arguments,
        str(Path(__file__).resolve()),
        "--step",
        "work",
        "--out",
        str(out),
    ]


def on_one_host(count: int) -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "facts.json"
        subprocess.run(launch(out, count), env=environment, check=True, cwd=directory)
        return json.loads(out.read_text())


def on_two_hosts() -> dict[str, Any]:
    """A process on each; nothing is shared but the cable."""

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    running = []
    try:
        for host in HOSTS:
            ip("netns", "add", host)
        ends = [f"{host[-1]}-cable" for host in HOSTS]
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for host, end, address in zip(HOSTS, ends, ADDRESSES, strict=True):
            ip("link", "set", end, "netns", host)
            ip("-n", host, "addr", "add", f"{address}/24", "dev", end)
            for device in (end, "lo"):
                ip("-n", host, "link", "set", device, "up")
        with tempfile.TemporaryDirectory() as directory:
            for rank, (host, end) in enumerate(zip(HOSTS, ends, strict=True)):
                own = Path(directory) / host
                own.mkdir()
                where = ("--nnodes", "2", "--node-rank", str(rank), "--master-addr", ADDRESSES[0])
                command = launch(own / "facts.json", 1, (*where, "--master-port", "29544"))
                environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": end}
                inside = ["ip", "netns", "exec", host, *command]
                running.append(subprocess.Popen(inside, env=environment, cwd=own))
            if any(process.wait() for process in running):
                raise SystemExit("a host failed")
            return json.loads((Path(directory) / HOSTS[0] / "facts.json").read_text())
    finally:
        for process in running:
            process.kill()
        for host in HOSTS:
            subprocess.run(["ip", "netns", "del", host], check=False)


def predicted(facts: dict[str, Any], workers: int) -> dict[str, float]:
    """Seconds of each stage with so many workers, from the pieces that one was timed with.

    Pieces are dealt out in turn, so the slowest worker's sum is what they take; the rest is done by
    all. Moments are added up once over the workers, and gradients in every step of a recovery, each
    by a ring: 2 (n - 1) / n times their bytes over every cable, and 2 (n - 1) delays.
    """
    one = facts["stages"]
    found = {}
    for name, stage in one.items():
        shared = {what: s for what, s in stage["pieces"].items() if what not in ALONE}
        left = stage["seconds"] - sum(sum(seconds) for seconds in shared.values())
        found[name] = left + sum(slowest(what, s, workers) for what, s in shared.items())
    if workers > 1:
        found["analyze"] += ring(8 * facts["moments"], workers)
        steps = -(-BATCHES // max(workers, 2))
        found["recover"] += steps * ring(4 * facts["weights"], workers)
    return found


def slowest(what: str, seconds: list[float], workers: int) -> float:
    """Of the workers, its share of the pieces."""
    if what == "recovering":  # by steps, which are timed where they end
        return sum(seconds) / workers
    return max(sum(seconds[k::workers]) for k in range(workers))


# What every process does for itself.
ALONE = ("calibrating", "re-estimating batch norm", "validating")


def ring(size: float, workers: int) -> float:
    """Seconds to add up so many bytes over workers on hosts of their own."""
    return 2 * (workers - 1) * (8 * size / workers / RATE + DELAY)


def show(facts: dict[str, Any]) -> None:
    """The tables of the document."""
    runs = facts["runs"]
    one, two = runs["1"], runs["2"]
    stages = list(one["stages"])
    header = ("seconds", "one process", "two", "predicted", "times as fast", "two hosts")
    hosts = runs.get("hosts")
    expected = predicted(one, 2)
    rows = []
    for name in (*stages, "all"):
        names = stages if name == "all" else [name]
        a, b = (sum(run["stages"][n]["seconds"] for n in names) for run in (one, two))
        c = sum(hosts["stages"][n]["seconds"] for n in names) if hosts else None
        wanted = sum(expected[n] for n in names)
        rows.append(
            (name, f"{a:.1f}", f"{b:.1f}", f"{wanted:.1f}", f"{a / b:.2f}", f"{c:.1f}" if c else "")
        )
    measured = markdown_table(header, rows)
    lines = []
    for workers in WORKERS:
        each = predicted(one, workers)
        total = sum(each.values())
        first = sum(predicted(one, 1).values())
        cells = [f"{each[n]:.1f}" for n in stages]
        lines.append((str(workers), *cells, f"{total:.1f}", f"{first / total:.1f}"))
    model = markdown_table(("workers", *stages, "all", "times as fast"), lines)
    on = ", ".join(f"{name} {value}" for name, value in facts["machine"].items())
    between_markers(DOCUMENT, "measured", f"{measured}\nMeasured on: {on}.\n")
    between_markers(DOCUMENT, "model", model)


def main(
    step: Annotated[list[str] | None, typer.Option(help="measure, hosts, show or work")] = None,
    out: Path = RESULTS,
) -> None:
    if step == ["work"]:
        return work(out)
    facts = json.loads(out.read_text()) if out.exists() else {"runs": {}}
    for one in step or ("measure",):
        if one == "measure":
            facts["machine"] = machine()
            for count in (1, 2):
                facts["runs"][str(count)] = on_one_host(count)
                save(out, facts)
        elif one == "hosts":
            facts["runs"]["hosts"] = on_two_hosts()
            save(out, facts)
    ranks = [run["ranks"] for run in facts["runs"].values()]
    print("plans are the same:", all(one == ranks[0] for one in ranks))
    return show(facts)


if __name__ == "__main__":
    typer.run(main)
