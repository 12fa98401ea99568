"""Architectures of every kind, small, for the sweep: a file for each family.

Each has a tuple `ARCHITECTURES`. What is not written by hand is taken from torchvision, timm and
transformers where they are installed.
"""

from importlib import import_module

from architectures.architecture import Architecture

FAMILIES = (
    "convolutional",
    "mobile",
    "dense_prediction",
    "generative",
    "sequences",
    "volumes",
    "attention",
    "odd_weights",
    "odd_calls",
    "wrapped",
    "number_formats",
    "edge_cases",
    "image_libraries",
    "language_models",
    "vision_and_sound",
)


def of_family(family: str) -> dict[str, Architecture]:
    """The architectures of one family, by name."""
    module = import_module(f"architectures.{family}")
    return {one.name: one for one in module.ARCHITECTURES}


def every() -> dict[str, Architecture]:
    """All architectures by name, family after family."""
    found: dict[str, Architecture] = {}
    for family in FAMILIES:
        mine = of_family(family)
        assert not found.keys() & mine.keys(), "two architectures of one name"
        found |= mine
    return found


def family_of(name: str) -> str:
    """The family that an architecture is of."""
    return next(family for family in FAMILIES if name in of_family(family))
