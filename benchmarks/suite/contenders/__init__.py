"""What competes, by name: modules with `PACKAGES`, `why_not(model)` and `compress(case, share)`.

`compress` gives a network of about a share of the MACs, before recovery, and its module is all that
a user would have to write: its lines are counted.
"""

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from types import ModuleType

from torch import nn

from suite.case import Case

NAMES = (
    "rankfold_macs",
    "rankfold_latency",
    "tucker_tutorial",
    "cp_tutorial",
    "tensorly_torch",
    "torch_pruning",
)


@dataclass(frozen=True)
class Contender:
    name: str
    compress: Callable[[Case, float], nn.Module]
    why_not: Callable[[nn.Module], str | None]  # of a network that it cannot take
    lines: int
    packages: dict[str, str]  # their versions


def find(name: str) -> Contender | str:
    """A contender, or which package is missing."""
    try:
        module = import_module(f"suite.contenders.{name}")
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    versions = {one: version(module.DISTRIBUTIONS.get(one, one)) for one in module.PACKAGES}
    return Contender(module.NAME, module.compress, module.why_not, _lines_of(module), versions)


def _lines_of(module: ModuleType) -> int:
    """Of code, without what only the suite asks for."""
    tree = ast.parse(inspect.getsource(module))
    ours = ("NAME", "PACKAGES", "DISTRIBUTIONS", "why_not")
    return sum(
        (node.end_lineno or node.lineno) - node.lineno + 1
        for node in tree.body[1:]
        if not any(name in ast.dump(node)[:200] for name in ours)
    )
