"""The networks of the suite, by name: modules with a function `make() -> Case`."""

from importlib import import_module

from suite.case import Case

NAMES = ("demo", "english_g2", "craft", "crepe", "minilm", "lstm", "language_model")


def make(name: str) -> Case:
    """Data is read and weights are loaded when a case is made."""
    return import_module(f"suite.cases.{name}").make()
