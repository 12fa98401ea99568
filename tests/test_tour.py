"""The notebook of examples/, its cells run in turn as a notebook would."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
TOUR = Path(__file__).parent.parent / "examples" / "tour.ipynb"


def cells() -> list[str]:
    notebook = json.loads(TOUR.read_text(encoding="utf-8"))
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]


def shown_by(code: str, namespace: dict[str, Any]) -> Any:
    """Run a cell; what its last expression gives."""
    tree = ast.parse(code)
    *before, last = tree.body
    if not isinstance(last, ast.Expr):
        exec(compile(tree, "cell", "exec"), namespace)
        return None
    exec(compile(ast.Module(before, []), "cell", "exec"), namespace)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), namespace)


def test_the_tour_runs_and_shows_what_it_says(capsys) -> None:
    namespace: dict[str, Any] = {}
    shown = [shown_by(code, namespace) for code in cells()]
    dense, analysis, plan, _, figure, accuracies, comparison, again, _ = shown
    for one, words in ((analysis, "methods, or why none"), (plan, "kept: parameters / MACs")):
        html = one._repr_html_()
        assert html.startswith("<table>") and words in html and "features.3" in html
    assert "latency per batch" in comparison._repr_html_()
    assert len(figure.axes) == 3 and all(axes.has_data() for axes in figure.axes)
    factorized, recovered = accuracies
    assert dense > 0.9 and recovered > dense - 0.02 and recovered >= factorized - 0.01
    assert again == recovered
    told = capsys.readouterr().out
    assert "30% of the MACs: predicted loss" in told and "def rebuild(network" in told


def test_the_notebook_is_kept_without_outputs() -> None:
    notebook = json.loads(TOUR.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
