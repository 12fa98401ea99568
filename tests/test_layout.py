"""Dependencies point one way: each floor imports only the floors below it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rankfold

SOURCE = Path(rankfold.__file__).parent
FLOORS = [
    {"errors", "files", "memory", "progress", "tables", "version", "without_weights"},
    {"documents"},
    {"shards"},
    {"ranks"},
    {"decompose"},
    {"layers"},
    {"methods", "nn"},
    {
        *("plan", "knapsack", "batches", "clock", "outputs", "fingerprint", "cost"),
        *("replacement", "unfusing", "copies", "merging", "narrowing", "runtime"),
        *("pretrained", "processes", "journal", "request", "recurrent_nodes"),
    },
    {"analysis", "measure"},
    {"distances"},
    {"recover", "refit", "sparsity", "outlook", "record", "products"},
    {"factorize", "deployment", "elastic", "card"},
    {"checkpoint", "search", "compress", "training", "from_disk"},
    {"demo", "imports", "picture", "report", "export"},
    {"cli"},
    {"__main__"},
]
HEIGHT = {name: height for height, floor in enumerate(FLOORS) for name in floor}


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: p.stem)
def test_imports_point_down(path: Path) -> None:
    unit = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if unit == "__init__":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rankfold."):
            imported = node.module.split(".")[1]
            assert imported == unit or HEIGHT[imported] <= HEIGHT[unit], (unit, imported)


def test_importing_takes_little_more_than_torch() -> None:
    """What is slow to import and seldom needed is imported when it is."""
    code = "import sys, rankfold; print(*sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    loaded = set(told.stdout.split())
    slow = {"accelerate", "dask", "matplotlib", "onnx", "onnxruntime", "plotly", "transformers"}
    slow |= {"scipy.interpolate", "scipy.optimize", "scipy.stats", "rankfold.cli", "typer"}
    assert "rankfold.compress" in loaded and not slow & loaded
