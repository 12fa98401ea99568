"""Recipes: the arguments of a command in a TOML file, to repeat a run or to change one thing of it.

    model = "package.module:make_model"
    data = "package.module:make_data"
    latency = 0.4
    keep = ["head*"]

Names are those of the options, without dashes in front. What the command line says goes before.
"""

import json
import tomllib
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from rankfold.documents import check_tame
from rankfold.errors import PlanError, RankfoldError

_ITSELF = ("config", "save_recipe")
_ASKED = ("COMMANDLINE", "DEFAULT_MAP")  # and not by default


def _read(context: typer.Context, path: Path | None) -> Path | None:
    """Have the options of the recipe as defaults; those of a command that knows them alone."""
    if path is None or context.resilient_parsing:
        return path
    try:
        recipe = tomllib.loads(path.read_text(encoding="utf-8"))
        check_tame(recipe)
    except (OSError, ValueError, RecursionError, PlanError) as error:
        raise RankfoldError(f"the recipe {path} cannot be read: {error}") from error
    known = {_name_of(parameter): parameter for parameter in context.command.params}
    for name, value in recipe.items():
        parameter = known.get(name)
        if parameter is None or parameter.name in _ITSELF:
            names = ", ".join(sorted(known.keys() - {_dashed(name) for name in _ITSELF}))
            raise RankfoldError(f"the recipe {path}: no option '{name:.80}'; there are {names}")
        if isinstance(value, list) != parameter.multiple or isinstance(value, dict):
            kind = "a list" if parameter.multiple else "one value"
            raise RankfoldError(f"the recipe {path}: '{name}' is {value!r:.80}, not {kind}")
    defaults = {str(known[name].name): value for name, value in recipe.items()}
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


Config = Annotated[
    Path | None,
    typer.Option("--config", callback=_read, is_eager=True, help="A recipe (TOML) to go by."),
]
SaveRecipe = Annotated[
    Path | None, typer.Option("--save-recipe", help="Write these options into a recipe.")
]


def write_recipe(context: typer.Context, path: Path) -> None:
    """Write what a command was asked for, on the command line or by a recipe."""
    lines = [f"{name} = {_toml(value)}" for name, value in _asked(context)]
    try:
        path.write_text("\n".join([f"# rankfold {context.info_name}", *lines, ""]), "utf-8")
    except OSError as error:
        reason = error.strerror or error
        raise RankfoldError(f"the recipe {path} cannot be written: {reason}") from error


def _asked(context: typer.Context) -> Iterator[tuple[str, Any]]:
    for parameter in context.command.params:
        name = str(parameter.name)
        source = context.get_parameter_source(name)
        if name not in _ITSELF and source is not None and source.name in _ASKED:
            yield _name_of(parameter), context.params[name]


def _name_of(parameter: Any) -> str:
    """As on the command line, without the dashes in front."""
    longest = max(parameter.opts, key=len)
    return longest.removeprefix("--")


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _toml(value: Any) -> str:
    """Of texts, numbers, truth values and lists of them, which JSON writes alike."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, Enum):
        value = value.value
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)
