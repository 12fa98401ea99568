"""Frozen dataclasses read from JSON documents, of which nothing is believed unchecked."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from rankfold.errors import PlanError

T = TypeVar("T")


def read(kind: type[T], document: Any, where: str) -> T:
    """The dataclass of which `dataclasses.asdict` and `json` made the document.

    Of its fields integers, numbers, text, truth values, None, tuples, mappings from text, other
    dataclasses, and choices between these are understood. Fields that are missing have their
    default. Raises PlanError, saying where, for anything that is not of the type that the dataclass
    says, and for NaN.
    """
    if not isinstance(document, dict):
        raise PlanError(f"{where}: {document!r:.80} is no object")
    hints = get_type_hints(kind)
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    if unknown := document.keys() - known.keys():
        raise PlanError(f"{where}: '{sorted(map(str, unknown))[0]:.80}' is unknown")
    values = {}
    for name, field in known.items():
        if name in document:
            values[name] = _value(hints[name], document[name], f"{where}: {name}")
        elif field.default is MISSING and field.default_factory is MISSING:
            raise PlanError(f"{where}: '{name}' is missing")
    return kind(**values)


def _value(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _any_of(arguments, value, where)
    if origin is Literal:
        if value in arguments:
            return value
    elif origin is tuple:
        if isinstance(value, list):
            return _tuple(arguments, value, where)
    elif origin is not None and issubclass(origin, Mapping):
        if isinstance(value, dict):
            return {str(key): _value(arguments[1], one, where) for key, one in value.items()}
    elif is_dataclass(kind):
        return read(kind, value, where)  # type: ignore[arg-type]
    elif kind is float and type(value) in (int, float):
        try:
            number = float(value)
        except OverflowError:
            number = math.nan
        if not math.isnan(number):
            return number
    elif kind in (int, str, bool, NoneType) and type(value) is kind:
        return value
    raise PlanError(f"{where} is {value!r:.80}")


def _any_of(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and NoneType in kinds:
        return None
    error: PlanError | None = None
    for kind in kinds:
        if kind is not NoneType:
            try:
                return _value(kind, value, where)
            except PlanError as refused:
                error = refused
    assert error is not None
    raise error


def _tuple(kinds: tuple[Any, ...], values: list[Any], where: str) -> tuple[Any, ...]:
    if len(kinds) == 2 and kinds[1] is ...:
        return tuple(_value(kinds[0], value, where) for value in values)
    if len(kinds) != len(values):
        raise PlanError(f"{where} has {len(values)} entries, not {len(kinds)}")
    return tuple(_value(kind, value, where) for kind, value in zip(kinds, values, strict=True))
