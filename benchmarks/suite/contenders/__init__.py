"""What competes, by name: modules with `PACKAGES`, `why_not(model)` and `compress(case, share)`.

`compress` gives a network of about a share of the MACs, before recovery, and its module is all that
a user would have to write: its lines are counted, with those of the module that it `BUILDS_ON`, if
there is one. A module may say `OF_TIME = True`, if its shares are of the time; `SHARES`, where it
cannot be asked for those of the case; `TRAINED = False` of what is not recovered; `finish(small,
case)`, what is done after recovery; and `baseline(model, case)`, the dense network in the runtime
that the finished one is for, beside which it is timed.
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
    "aimet",
    "aimet_weight_svd",
    "onnx_int8",
    "rankfold_int8",
)


@dataclass(frozen=True)
class Contender:
    name: str
    compress: Callable[[Case, float], nn.Module]
    why_not: Callable[[nn.Module], str | None]  # of a network that it cannot take
    finish: Callable[[nn.Module, Case], nn.Module]
    baseline: Callable[[nn.Module, Case], nn.Module]
    of_time: bool  # whether it is asked for a share of the time
    shares: tuple[float, ...] | None  # those it can be asked for
    trained: bool  # whether it can be recovered
    lines: int
    packages: dict[str, str]  # their versions


def find(name: str) -> Contender | str:
    """A contender, or which package is missing."""
    try:
        module = import_module(f"suite.contenders.{name}")
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    versions = {one: version(module.DISTRIBUTIONS.get(one, one)) for one in module.PACKAGES}
    return Contender(
        module.NAME,
        module.compress,
        module.why_not,
        getattr(module, "finish", lambda small, case: small),
        getattr(module, "baseline", lambda model, case: model),
        getattr(module, "OF_TIME", False),
        getattr(module, "SHARES", None),
        getattr(module, "TRAINED", True),
        sum(map(_lines_of, filter(None, (module, getattr(module, "BUILDS_ON", None))))),
        versions,
    )


def _lines_of(module: ModuleType) -> int:
    """Of code, without what only the suite asks for."""
    tree = ast.parse(inspect.getsource(module))
    ours = ("NAME", "PACKAGES", "DISTRIBUTIONS", "OF_TIME", "SHARES", "BUILDS_ON")
    ours += ("why_not", "baseline")
    return sum(
        (node.end_lineno or node.lineno) - node.lineno + 1
        for node in tree.body[1:]
        if not any(name in ast.dump(node)[:200] for name in ours)
    )
