"""Changes the ground floor in small ways, and says which changes the tests do not notice.

    python tools/mutation.py --each 6

Of each file of `decompose/` and of the solver (`[tool.mutmut]` in pyproject.toml) so many of
mutmut's mutants are drawn by seed and tried; of those of an earlier run the ones again that nothing
noticed. The counts and the survivors, each with what was changed and what somebody has found out of
it, go to benchmarks/mutation.json, a table to CONTRIBUTING.md.
"""

import argparse
import json
import random
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

from fuzz import between_markers

HERE = Path(__file__).resolve().parents[1]
RESULTS = HERE / "benchmarks" / "mutation.json"
DOCUMENT = HERE / "CONTRIBUTING.md"
MUTMUT = Path(sys.executable).parent / "mutmut"
NOT_TRIED = "not checked"
UNNOTICED = ("survived", "no tests")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--each", type=int, default=6, help="mutants of each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="files whose names contain this")
    options = parser.parse_args()
    mutmut("run", "none is named so")  # makes them, learns which tests reach which, and ends
    known = statuses()
    chosen = [
        name
        for module, names in sorted(by_module(known).items())
        if options.only in module
        for name in drawn(names, options.each, options.seed)
    ]
    wanted = [name for name in chosen if known[name] in (NOT_TRIED, *UNNOTICED)]
    if wanted:
        mutmut("run", "--max-children", "1", *wanted)
    write({name: status for name, status in statuses().items() if status != NOT_TRIED})


def mutmut(*arguments: str) -> None:
    subprocess.run([MUTMUT, *arguments], cwd=HERE, check=False)


def statuses() -> dict[str, str]:
    """Of each mutant: killed, survived, timeout, no tests, not checked, ..."""
    done = subprocess.run(
        [MUTMUT, "results", "--all", "true"], cwd=HERE, check=True, capture_output=True, text=True
    )
    lines = (line.split(": ") for line in done.stdout.splitlines())
    return {parts[0].strip(): parts[1].strip() for parts in lines if len(parts) == 2}


def by_module(names: dict[str, str]) -> dict[str, list[str]]:
    """`rankfold.decompose.matrix.x_svd__mutmut_3` is one of rankfold.decompose.matrix."""
    found = defaultdict(list)
    for name in names:
        found[name.rpartition(".")[0]].append(name)
    return found


def drawn(names: list[str], count: int, seed: int) -> list[str]:
    order = sorted(names)
    random.Random(seed).shuffle(order)
    return order[:count]


def change(name: str) -> str:
    """The lines that a mutant takes away and puts in."""
    shown = subprocess.run(
        [MUTMUT, "show", name], cwd=HERE, check=True, capture_output=True, text=True
    ).stdout
    lines = [
        line for line in shown.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")
    ]
    return "\n".join(lines)


def write(tried: dict[str, str]) -> None:
    """What was found, beside what somebody has said of earlier survivors."""
    before = json.loads(RESULTS.read_text())["survivors"] if RESULTS.exists() else {}
    survivors = {}
    for name in sorted(name for name, status in tried.items() if status in UNNOTICED):
        changed = change(name)
        known = before.get(name, {})
        said = known.get("examined", "") if known.get("change") == changed else ""
        survivors[name] = {"change": changed, "examined": said}
    modules = {
        module: dict(Counter(tried[name] for name in names))
        for module, names in sorted(by_module(tried).items())
    }
    document = {"modules": modules, "survivors": survivors}
    RESULTS.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    tell(document)


def tell(document: dict) -> None:
    """Write what was found into CONTRIBUTING.md."""
    lines = ["| file | tried | noticed | not noticed |", "| --- | --- | --- | --- |"]
    for module, found in document["modules"].items():
        file = module.removeprefix("rankfold.").replace(".", "/")
        tried, missed = sum(found.values()), sum(found.get(status, 0) for status in UNNOTICED)
        lines.append(f"| `{file}.py` | {tried} | {tried - missed} | {missed} |")
    between_markers(DOCUMENT, "mutation", "\n".join(lines))


if __name__ == "__main__":
    main()
