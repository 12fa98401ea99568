"""Tables and pictures of what was measured, the latest of each trial."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from race import between_markers, markdown_table

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """The latest row of each trial, in the order in which they were first made."""
    latest: dict[tuple[Any, ...], Row] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        row = json.loads(line)
        latest[row["case"], row["contender"], row["share"]] = row
    return list(latest.values())


def write_document(rows: Sequence[Row], document: Path) -> None:
    """Each network's table and picture, and what of each contender one should know."""
    networks = {row["case"]: row.get("network", row["case"]) for row in rows if "dense" in row}
    parts = []
    for case, network in networks.items():
        measured = [row for row in rows if row["case"] == case and "dense" in row]
        parts.append(f"### {network}\n\n{_note(measured)}\n\n{table(measured)}")
        parts.append(f"{_summary(measured)}")
        picture = document.with_name(f"results-{case}.svg")
        draw(measured, picture)
        parts.append(f"![{network}: score against time]({picture.name})\n")
        parts.append(_refused([row for row in rows if row["case"] == case and "why not" in row]))
    between_markers(document, "suite", "\n".join(part for part in parts if part))


def write_readme(rows: Sequence[Row], readme: Path) -> None:
    """The same in short: of each network that is measured time and score, and the picture."""
    parts = []
    for case in dict.fromkeys(row["case"] for row in rows if "dense" in row):
        measured = [row for row in rows if row["case"] == case and "dense" in row]
        network = measured[0].get("network", case)
        header = (f"{network} (dense {_score(measured[0]['dense'])})", "time", "MACs", "score")
        lines = [
            (
                row["title"],
                f"{row['time kept']:.0%}",
                f"{row['MACs kept']:.0%}",
                _score(row["recovered"]),
            )
            for row in measured
        ]
        parts.append(f"{_note(measured)}\n\n{markdown_table(header, lines)}")
        parts.append(f"![{network}: score against time](docs/results-{case}.svg)\n")
    between_markers(readme, "suite", "\n".join(parts))


def _note(rows: Sequence[Row]) -> str:
    machine, first = rows[0]["machine"], rows[0]
    return (
        f"Score: {first['unit']}; the dense network's is {_score(first['dense'])}. Measured "
        f"{first['date'][:10]} on {machine['processor']}, {machine['threads']} threads, torch "
        f"{machine['torch']}."
    )


def table(rows: Sequence[Row]) -> str:
    """What was measured of each contender at each share."""
    header = (
        *("contender", "MACs", "parameters", "time", "score", "recovered"),
        *("to compress", "memory", "lines", "ONNX"),
    )
    return markdown_table(header, [_line(row) for row in rows])


def _line(row: Row) -> tuple[str, ...]:
    ratios = [ours / dense for dense, ours in zip(row["dense ms"], row["small ms"], strict=True)]
    return (
        row["title"],
        f"{row['MACs kept']:.0%}",
        f"{row['parameters kept']:.0%}",
        f"{row['time kept']:.0%} ({min(ratios):.0%} to {max(ratios):.0%})",
        _score(row["factorized"]),
        _score(row["recovered"]),
        f"{row['seconds to compress']:.1f} s",
        f"{row['memory to compress'] / 1e6:.0f} MB",
        str(row["lines"]),
        "yes" if row["exported"] else "no",
    )


def _summary(rows: Sequence[Row]) -> str:
    """At equal time the score, at equal score the time; between what was measured."""
    dense = rows[0]["dense"]
    lines = []
    for title in dict.fromkeys(row["title"] for row in rows):
        points = [(1.0, dense)]
        points += [(row["time kept"], row["recovered"]) for row in rows if row["title"] == title]
        half = _at([(time, score) for time, score in points], 0.5)
        lost = _at([(dense - score, time) for time, score in points], 0.01)
        lines.append((title, _score(half), "" if lost is None else f"{lost:.0%}"))
    header = ("after recovery", "score at half of the time", "time at one point lost")
    return markdown_table(header, lines)


def _at(points: Sequence[tuple[float, float]], place: float) -> float | None:
    """Interpolated between the points beside it; None outside of them."""
    below = [point for point in points if point[0] <= place]
    above = [point for point in points if point[0] >= place]
    if not below or not above:
        return None
    (x0, y0), (x1, y1) = max(below), min(above)
    return y0 if x0 == x1 else y0 + (y1 - y0) * (place - x0) / (x1 - x0)


def _score(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}" if abs(value) <= 1 else f"{value:.1f}"


def _refused(rows: Sequence[Row]) -> str:
    said = dict.fromkeys(f"{row.get('title', row['contender'])}: {row['why not']}" for row in rows)
    return f"Not measured: {'; '.join(said)}.\n" if said else ""


def draw(rows: Sequence[Row], path: Path) -> None:
    """Score after recovery against the share of the time."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for title in dict.fromkeys(row["title"] for row in rows):
        points = sorted(
            (row["time kept"], row["recovered"]) for row in rows if row["title"] == title
        )
        axes.plot(*zip(*points, strict=True), marker="o", label=title)
    axes.axhline(rows[0]["dense"], color="0.6", linestyle="--", label="dense")
    axes.set_xlabel("share of the dense network's time")
    axes.set_ylabel(rows[0]["unit"].replace(", %", ""))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    with rc_context({"svg.hashsalt": "rankfold"}):  # the same picture of the same rows
        figure.savefig(path, metadata={"Date": None})
