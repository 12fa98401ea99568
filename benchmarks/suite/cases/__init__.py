"""The networks of the suite, by name: modules with `make() -> Case` and `SHARES` of the MACs.

And `TIMES`, shares of the time, where those are others. Sizes of data and recovery are such that a
contender takes minutes, not hours.
"""

from importlib import import_module

from suite.case import Case

NAMES = ("demo", "english_g2", "craft", "crepe", "minilm", "lstm", "language_model")


def shares(name: str, of_time: bool = False) -> tuple[float, ...]:
    """Of the MACs or the time, about what contenders are asked for."""
    module = import_module(f"suite.cases.{name}")
    return getattr(module, "TIMES", module.SHARES) if of_time else module.SHARES


def make(name: str) -> Case:
    """Data is read and weights are loaded when a case is made."""
    return import_module(f"suite.cases.{name}").make()
