"""Tables and pictures of what was measured, the latest of each trial."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from race import between_markers, markdown_table

from suite import cases, contenders

Row = dict[str, Any]
Point = tuple[float, float]  # share of the time, score

POINT = 0.01  # of the score, where a case does not say otherwise


def read(path: Path) -> list[Row]:
    """The latest row of each trial, in the order in which they were first made."""
    latest: dict[tuple[Any, ...], Row] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        row = json.loads(line)
        latest[row["case"], row["contender"], row["share"]] = row
    return list(latest.values())


def of_latest_processor(rows: Sequence[Row]) -> list[Row]:
    """Of each case what was measured where its latest row was: shares of other times say little."""
    latest = {
        row["case"]: row["machine"]["processor"]
        for row in sorted((row for row in rows if "machine" in row), key=lambda row: row["date"])
    }
    return [
        row
        for row in rows
        if "machine" not in row or row["machine"]["processor"] == latest[row["case"]]
    ]


def write_document(rows: Sequence[Row], document: Path) -> None:
    """Each network's tables and picture, and why what is missing is."""
    parts = []
    for case, measured in _by_case(rows).items():
        network = measured[0]["network"]
        picture = document.with_name(f"results-{case}.svg")
        draw(measured, picture)
        parts += [f"### {network}\n", f"{_note(measured)}\n", table(measured), _summary(measured)]
        parts.append(f"![{network}: score against time and parameters]({picture.name})\n")
        parts.append(_refused([row for row in rows if row["case"] == case and "why not" in row]))
    between_markers(document, "suite", "\n".join(part for part in parts if part))


def write_readme(rows: Sequence[Row], readme: Path) -> None:
    """One table of all networks and contenders, and the picture of the first."""
    networks = _by_case(rows)
    header = ["", *(f"{one[0]['network']} ({_dense(one)})" for one in networks.values())]
    every = [row for one in networks.values() for row in one]
    titles = {
        row["contender"]: row["title"]
        for row in sorted(every, key=lambda row: contenders.NAMES.index(row["contender"]))
    }
    tried = {(row["case"], row["contender"]) for row in rows}
    lines = [
        (title, *(_cell(one, title, (case, name) in tried) for case, one in networks.items()))
        for name, title in titles.items()
    ]
    case, first = next(iter(networks.items()))
    picture = f"![{first[0]['network']}: score against time](docs/results-{case}.svg)"
    text = f"{markdown_table(header, lines)}\n{_where(every)}\n\n{picture}\n"
    between_markers(readme, "suite", text)


def _cell(rows: Sequence[Row], title: str, is_tried: bool) -> str:
    """The time at a point lost, the least of the network in bold; "no" if there is no result."""
    if title not in _titles(rows):
        return "no" if is_tried else ""
    found = {one: _fastest(rows, one) for one in _titles(rows)}
    shown = _shown_time(found[title])
    return f"**{shown}**" if found[title] == min(filter(None, found.values())) else shown


def _by_case(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """What was measured of each network."""
    measured = sorted(
        (row for row in rows if "factorized" in row),
        key=lambda row: (contenders.NAMES.index(row["contender"]), -row["share"]),
    )
    found = {case: [row for row in measured if row["case"] == case] for case in cases.NAMES}
    return {case: ours for case, ours in found.items() if ours}


def _titles(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["title"] for row in rows))


def _dense(rows: Sequence[Row]) -> str:
    return _score(rows[0]["dense"])


def _note(rows: Sequence[Row]) -> str:
    return f"Score: {rows[0]['unit']}; the dense network's is {_dense(rows)}. {_where(rows)}"


def _where(rows: Sequence[Row]) -> str:
    dates = sorted({row["date"][:10] for row in rows})
    between = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    machines = dict.fromkeys(
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}"
        for machine in (row["machine"] for row in rows)
    )
    return f"Measured {between} on {'; '.join(machines)}."


def table(rows: Sequence[Row]) -> str:
    """What was measured of each contender at each share."""
    header = (
        *("contender", "MACs", "parameters", "time", "score", "recovered"),
        *("to compress", "memory", "lines", "ONNX"),
    )
    return markdown_table(header, [_line(row) for row in rows])


def _line(row: Row) -> tuple[str, ...]:
    ratios = [ours / dense for dense, ours in zip(row["dense ms"], row["small ms"], strict=True)]
    memory, exported = row["memory to compress"], row["exported"]
    return (
        row["title"],
        f"{row['MACs kept']:.0%}",
        f"{row['parameters kept']:.0%}",
        f"{row['time kept']:.0%} ({min(ratios):.0%} to {max(ratios):.0%})",
        _score(row["factorized"]),
        _score(row["recovered"]),
        f"{'then ' if memory is None else ''}{row['seconds to compress']:.1f} s",
        "" if memory is None else f"{memory / 1e6:.0f} MB",
        str(row["lines"]),
        "" if exported is None else "yes" if exported else "no",
    )


def _summary(rows: Sequence[Row]) -> str:
    """At equal time the score, at equal score the time; between what was measured."""
    lines = []
    for title in _titles(rows):
        half = _score_at(_points(rows, title), 0.5)
        lines.append((title, _score(half), _shown_time(_fastest(rows, title))))
    header = ("after recovery", "score at half of the time", "time at a point lost")
    return markdown_table(header, lines)


def _points(rows: Sequence[Row], title: str) -> list[Point]:
    """The dense network's and this contender's, by time."""
    ours = [(row["time kept"], row["recovered"]) for row in rows if row["title"] == title]
    return sorted([(1.0, rows[0]["dense"]), *ours])


def _score_at(points: Sequence[Point], time: float) -> float | None:
    """Interpolated; None below what was measured."""
    for (t0, y0), (t1, y1) in pairwise(points):
        if t0 <= time <= t1:
            return y0 + (y1 - y0) * (time - t0) / (t1 - t0)
    return None


def _fastest(rows: Sequence[Row], title: str) -> tuple[float, bool] | None:
    """The least time at which a point is lost, and whether less than that was; None: not faster."""
    enough = rows[0]["dense"] - rows[0].get("point", POINT)
    points = _points(rows, title)
    if points[0][1] >= enough:
        return (points[0][0], True) if points[0][0] < 1 else None
    for (t0, y0), (t1, y1) in pairwise(points):
        if y1 >= enough:
            return t0 + (t1 - t0) * (enough - y0) / (y1 - y0), False
    return None


def _shown_time(found: tuple[float, bool] | None) -> str:
    if found is None:
        return "not faster"
    time, is_more = found
    return f"{'< ' if is_more else ''}{time:.0%}"


def _score(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}" if abs(value) <= 1 else f"{value:.1f}"


def _refused(rows: Sequence[Row]) -> str:
    said = dict.fromkeys(f"{row.get('title', row['contender'])}: {row['why not']}" for row in rows)
    return f"Not measured: {'; '.join(said)}.\n" if said else ""


def draw(rows: Sequence[Row], path: Path) -> None:
    """Score after recovery against the shares of the time and of the parameters."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, of in zip(panels, ("time", "parameters"), strict=True):
        for title in _titles(rows):
            ours = [row for row in rows if row["title"] == title]
            points = sorted((row[f"{of} kept"], row["recovered"]) for row in ours)
            axes.plot(*zip(*points, strict=True), marker="o", label=title)
        axes.axhline(rows[0]["dense"], color="0.6", linestyle="--", label="dense")
        axes.set_xlabel(f"share of the dense network's {of}")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(rows[0]["unit"].replace(", %", ""))
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8
    )
    with rc_context({"svg.hashsalt": "rankfold"}):  # the same picture of the same rows
        figure.savefig(path, metadata={"Date": None})
