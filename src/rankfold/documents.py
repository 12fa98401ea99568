"""JSON documents and frozen dataclasses read from them, of which nothing is believed unchecked."""

import json
import math
import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from rankfold.errors import UNPRINTABLE, PlanError

T = TypeVar("T")

_MOST_BYTES = 64 * 2**20
_DEEPEST = 32
_GREATEST = 2**63 - 1


def read_json(path: Path) -> Any:
    """The JSON document in a file, of tame numbers, texts and depth.

    Raises PlanError for a file that is no regular one, has more than 64 MiB, or is not JSON in
    UTF-8; and for keys that are there twice, integers of more than 64 bits, more than 32 levels,
    and texts with control characters. OSError, if it cannot be read, is left to the caller.
    """
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise PlanError("it is no regular file")
    if about.st_size > _MOST_BYTES:
        raise PlanError(f"its {about.st_size} bytes are more than {_MOST_BYTES}")
    try:
        document = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:  # of text, numbers and JSON that are none
        raise PlanError(str(error)) from error
    check_tame(document)
    return document


def check_tame(document: Any) -> None:
    """Raise PlanError for what nothing that rankfold writes holds: see `read_json`."""
    level = [document]
    for _ in range(_DEEPEST):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += value.keys()
                below += value.values()
            elif isinstance(value, list | tuple):
                below += value
            elif isinstance(value, str):
                if UNPRINTABLE.search(value):
                    raise PlanError(f"control characters in {value[:80]!a}")
            elif isinstance(value, int) and abs(value) > _GREATEST:
                raise PlanError("an integer of more than 64 bits")
        if not below:
            return
        level = below
    raise PlanError(f"more than {_DEEPEST} levels")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise PlanError(f"'{twice:.80}' is there twice")
    return found


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
