"""What becomes of numbers that are hard to compute with: docs/numerics.md, from real runs.

    python benchmarks/numerics.py            # minutes; --methods svd tucker2 for some

The cases, and what has to hold of each, are those of tests/stress.py; tests/test_numerics.py
runs those that are quick.
"""

import argparse
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE / "tests"))
warnings.simplefilter("ignore")

import stress
import torch
from race import between_markers, markdown_table
from stress import CASES, DECOMPOSITIONS, LOSSES, MOMENTS, NETWORKS, RECOVERIES, Outcome

from rankfold.methods import METHODS

DOCUMENT = HERE / "docs" / "numerics.md"
METRICS = ("weight", "response", "fisher", "auto")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--dry", action="store_true", help="print, and leave the document alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts = {
        "numerics: decompositions": of_decompositions(),
        "numerics: metrics": of_metrics(),
        "numerics: networks": of_networks(),
        "numerics: planner": of_planner(),
        "numerics: recovery": of_recovery(),
        "numerics: methods": of_methods(options.methods),
    }
    for name, table in parts.items():
        print(f"{name}\n\n{table}\n")
        if not options.dry:
            between_markers(DOCUMENT, name, table)


def of_methods(names: Iterable[str]) -> str:
    rows = []
    for name in names:
        for layer in stress.layers_of(METHODS[name]()):
            outcomes = []
            for case in CASES:
                given = stress.stressed(layer, case)
                found = stress.outcome_of(METHODS[name](), given)
                outcomes.append(found)
                kind = next(given.parameters()).dtype
                wrong = stress.what_is_wrong(found, case, outcomes[0], kind, name)
                if wrong is not None:
                    outcomes[-1] = Outcome(wrong=wrong)
            rows.append([f"{name}, {type(layer).__name__}", *map(told, outcomes)])
            print(*rows[-1], file=sys.stderr, flush=True)
    return across(rows)


def of_decompositions() -> str:
    return across(
        [name, *(told(stress.decomposed(about, case)) for case in CASES)]
        for name, about in DECOMPOSITIONS.items()
    )


def across(rows: Iterable[list[str]]) -> str:
    """Cases down, methods or decompositions across would be too wide: they are lines in full."""
    lines = []
    for name, *outcomes in rows:
        found: dict[str, list[str]] = {}
        for case, outcome in zip(CASES, outcomes, strict=True):
            found.setdefault(kind_of(outcome), []).append(
                f"{case.name} ({outcome})" if kind_of(outcome) == "wrong" else case.name
            )
        errors = [float(one) for one in outcomes if kind_of(one) == "right" and one != "right"]
        worst = f"{max(errors):.1g}" if errors else "-"
        lines.append(
            [
                name,
                f"{len(found.get('right', []))} of {len(CASES)}",
                worst,
                ", ".join(found.get("refused", [])) or "-",
                ", ".join(found.get("wrong", [])) or "none",
            ]
        )
    return markdown_table(
        ["", "right", "worst error at the greatest rank", "refused", "wrong"], lines
    )


def kind_of(outcome: str) -> str:
    if outcome.startswith("refused"):
        return "refused"
    return "wrong" if outcome.startswith("wrong") else "right"


def told(outcome: Outcome) -> str:
    if outcome.wrong is not None:
        return f"wrong: {outcome.wrong}"
    if outcome.refused is not None:
        return f"refused: {outcome.refused}"
    last = outcome.errors[-1] if outcome.errors else float("nan")
    return "right" if last != last else f"{last:.2g}"


def of_metrics() -> str:
    names = ("svd", "full-rank", "interpolative", "cp")
    rows = []
    for case, (moments, _) in MOMENTS.items():
        layer = stress.stressed(stress.LAYERS[0], CASES[0])
        rows.append([case, *(told(stress.outcome_of(METHODS[n](), layer, moments)) for n in names)])
    return markdown_table(["moments", *names], rows)


def of_networks() -> str:
    rows = [
        [name, *(told(stress.network_outcome(name, metric)) for metric in METRICS)]
        for name in NETWORKS
    ]
    return markdown_table(["network or data", *METRICS], rows)


def of_planner() -> str:
    scales = (1.0, 1e12, 1e-6)
    rows = []
    for name, make in LOSSES.items():
        worst = [max(stress.planned(make, scale)[place] for scale in scales) for place in (0, 1)]
        rows.append([name, *(f"{one - 1:.0e}" if one > 1 else "0" for one in worst)])
    header = ["losses", "sum over the least, beyond 1", "greatest over the least, beyond 1"]
    return markdown_table(header, rows)


def of_recovery() -> str:
    rows = []
    for name in RECOVERIES:
        found = stress.recovered(name)
        epochs = f"{found.errors[0] - 1:.0f} of 2 epochs, weights finite" if found.errors else ""
        rows.append([name, epochs or told(found)])
    return markdown_table(["network, data or settings", "what became of it"], rows)


if __name__ == "__main__":
    main()
