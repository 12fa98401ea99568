"""Has rankfold read very many spoiled files, and says what went wrong.

    python tools/fuzz.py --seeds 0 100000

Each file is one of `tests/hostile.py`, by its seed. They are read in processes of limited memory
and time, one after another; the counts go to benchmarks/fuzz.json, and so does whatever ended in
another error than rankfold's own, in a process killed, or in a file written elsewhere.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
RESULTS = HERE / "benchmarks" / "fuzz.json"
SECURITY = HERE / "SECURITY.md"
ROOM = 3 * 2**30  # bytes of address space beyond those of a process that has only begun
PIECE = 2500  # files for each process
MOST_SECONDS = 1200  # of processor time for it


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs=2, default=(0, 100_000))
    parser.add_argument("--only", help="one of the ways in")
    parser.add_argument("--tell", action="store_true", help="the paragraph in SECURITY.md alone")
    parser.add_argument("--piece", help=argparse.SUPPRESS)
    options = parser.parse_args()
    first, end = options.seeds
    if options.tell:
        tell(json.loads(RESULTS.read_text()))
        return
    if options.piece:
        read_piece(first, end, options.only, Path(options.piece))
        return
    counts: dict[str, Counter[str]] = {}
    wrong: list[dict[str, object]] = []
    seconds, peak = 0.0, 0
    while first < end:
        start = time.perf_counter()
        last = min(first + PIECE, end)
        piece, died = in_a_process(first, last, options.only)
        seconds += time.perf_counter() - start
        peak = max(peak, piece["peak_bytes"])
        for name, found in piece["counts"].items():
            counts.setdefault(name, Counter()).update(found)
        wrong += piece["wrong"]
        if died is not None:
            wrong.append({"seed": piece["next"], "wrong": died})
            piece["next"] += 1
        first = piece["next"]
        print(f"{first} read, {seconds:.0f} s, {len(wrong)} wrong", flush=True)
        write(options.seeds[0], first, counts, wrong, seconds, peak)


def write(
    first: int, end: int, counts: dict[str, Counter[str]], wrong: list, seconds: float, peak: int
) -> None:
    document = {
        "machine": {"python": platform.python_version(), "processor": platform.machine()},
        "seeds": [first, end],
        "seconds": round(seconds),
        "peak_megabytes": round(peak / 2**20),
        "ways_in": {name: dict(sorted(found.items())) for name, found in sorted(counts.items())},
        "wrong": wrong,
    }
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")


def tell(document: dict) -> None:
    """Write what was found into SECURITY.md."""
    first, end = document["seeds"]
    ways = document["ways_in"]
    parts = ", ".join(f"{name} {sum_of(found):,}" for name, found in ways.items())
    accepted = sum(found.get("accepted", 0) for found in ways.values())
    wrong = len(document["wrong"])
    refused = end - first - accepted - wrong
    found = len(document.get("found_and_mended", []))
    mended = f" ({found} that did were met on the way, mended, and read again)" if found else ""
    text = f"""`tools/fuzz.py` has read {end - first:,} spoiled files ({parts}). What
is done to them is drawn by seed: JSON with other values, keys and depth, headers of tensors that
lie, other methods, settings and ranks, bytes changed, cut and repeated, links in the place of
files. {accepted:,} were read, since what was changed in them may be so; {refused:,} were refused
with one of rankfold's errors; {wrong or "none"} end in anything else: another error, more than
ten seconds or 3 GiB for one, a file written or changed elsewhere, code run. It took
{document["seconds"] / 60:.0f} minutes and {document["peak_megabytes"]:,} MB{mended}. A few hundred
are read in every run of the tests (`tests/test_hostile.py`)."""
    between_markers(SECURITY, "fuzz", text)


def sum_of(found: dict[str, int]) -> int:
    return found.get("accepted", 0) + found.get("refused", 0)


def between_markers(path: Path, name: str, text: str) -> None:
    start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    head, _, rest = path.read_text().partition(start)
    path.write_text(f"{head}{start}\n{text}\n\n{end}{rest.partition(end)[2]}")


def in_a_process(first: int, end: int, only: str | None) -> tuple[dict, str | None]:
    """What was counted of these seeds, and how the process died, if it did."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, __file__, "--seeds", str(first), str(end), "--piece", file.name]
        command += ["--only", only] if only else []
        done = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
        text = Path(file.name).read_text()
    if not text:
        raise SystemExit(f"nothing was read: {done.stderr[-2000:]}")
    died = None if done.returncode == 0 else f"exit status {done.returncode}: {done.stderr[-500:]}"
    return json.loads(text), died


def read_piece(first: int, end: int, only: str | None, file: Path) -> None:
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(HERE / "tests"))
    if Path("/dev/shm").is_dir():
        tempfile.tempdir = "/dev/shm"  # a million small files
    import hostile
    import torch

    torch.set_num_threads(1)
    counts: dict[str, Counter[str]] = {}
    wrong: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as room:
        readers = hostile.make_readers(Path(room))
        limit()
        for seed in range(first, end):
            note(file, counts, wrong, seed)
            name, files, link = hostile.case_of(readers, seed, only)
            found = hostile.answer(readers[name], files, link)
            own = counts.setdefault(name, Counter())
            own["accepted" if found.accepted else "refused"] += 1
            if found.wrong is not None:
                own["wrong"] += 1
                wrong.append({"seed": seed, "way_in": name, "wrong": found.wrong})
        note(file, counts, wrong, end)


def limit() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    spent = int(time.process_time())
    resource.setrlimit(resource.RLIMIT_CPU, (spent + MOST_SECONDS, spent + MOST_SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**28, 2**28))


def note(file: Path, counts: dict[str, Counter[str]], wrong: list, seed: int) -> None:
    """What was found before this seed, for the case that it is the last."""
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {"next": seed, "counts": counts, "wrong": wrong, "peak_bytes": peak}
    file.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
