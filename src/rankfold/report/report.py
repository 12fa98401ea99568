"""What a network remembers of its making, laid out in a page (Plotly: extra `report`)."""

import json
import math
import os
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import torch

from rankfold.errors import RankfoldError
from rankfold.files import replace_file
from rankfold.record import Record
from rankfold.version import __version__

_BUDGETS = {"macs": "--macs", "params": "--params", "latency": "--latency"}


def write_report(
    record: Record,
    path: str | os.PathLike[str],
    *,
    title: str = "A factorized network",
    origin: Mapping[str, str] | None = None,
) -> None:
    """Write one HTML file: before and after, every layer, and what other budgets would give.

    `record` is that of `record_of(small)`, or of `read_record` for a saved model; what it does not
    remember is left out. `origin` holds the import paths that `save` was given: of them the command
    for another budget is made. The file refers to nothing outside of itself. Raises RankfoldError
    without Plotly, or for a file that cannot be written.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise RankfoldError("a report needs plotly: pip install 'rankfold[report]'") from error
    page = Template(_text("page.html")).substitute(
        title=_escaped(title),
        style=_text("page.css"),
        plotly=get_plotlyjs(),
        script=_text("page.js"),
        facts=_script_safe(facts_of(record, title, origin or {})),
    )
    try:
        replace_file(Path(path), lambda file: file.write_text(page, encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or error
        raise RankfoldError(f"the report {path} cannot be written: {reason}") from error


def facts_of(record: Record, title: str, origin: Mapping[str, str]) -> dict[str, Any]:
    """All that the page shows, as JSON primitives."""
    plan = record.plan
    return {
        "title": title,
        "versions": {"rankfold": __version__, "torch": torch.__version__},
        "plan": plan.to_json(),
        "comparison": None if record.comparison is None else asdict(record.comparison),
        "recovery": None if record.recovery is None else asdict(record.recovery),
        "outlook": None if record.outlook is None else record.outlook.to_json(),
        "removed": len(record.removed),
        "merged": len(record.merged),
        "command": _command(origin),
        "budgets": _BUDGETS,
    }


def _command(origin: Mapping[str, str]) -> str:
    """The command line that makes such a network, but for its budget and its place."""
    model = origin.get("model", "package.module:make_model")
    options = [
        f"--{name} {shlex.quote(origin[name])}"
        for name in ("data", "text", "test", "metric", "forward")
        if name in origin
    ]
    if not origin:
        options = ["--data package.module:make_data"]
    return " ".join(["rankfold compress", shlex.quote(model), *options])


def _script_safe(facts: dict[str, Any]) -> str:
    """JSON that cannot end the element it stands in; infinities as null."""
    text = json.dumps(_finite(facts), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _text(name: str) -> str:
    return files("rankfold.report").joinpath(name).read_text(encoding="utf-8")
