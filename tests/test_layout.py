"""Dependencies point one way: each floor imports only the floors below it."""

import ast
from pathlib import Path

import pytest

import rankfold

SOURCE = Path(rankfold.__file__).parent
FLOORS = [
    {"errors", "progress", "tables", "version"},
    {"documents"},
    {"ranks"},
    {"decompose"},
    {"layers"},
    {"methods", "nn"},
    {
        *("plan", "knapsack", "batches", "fingerprint", "cost", "replacement", "unfusing"),
        *("merging", "narrowing", "runtime", "pretrained", "processes"),
    },
    {"analysis", "measure"},
    {"distances"},
    {"recover", "refit", "sparsity", "outlook", "record", "products"},
    {"factorize", "deployment", "elastic", "card"},
    {"checkpoint", "search", "compress", "training"},
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
