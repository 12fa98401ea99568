import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankfold.documents import check_tame, read, read_json
from rankfold.errors import PlanError


@dataclass(frozen=True)
class Part:
    name: str
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Whole:
    share: float
    kind: Literal["eager", "compile"]
    pair: tuple[str, float]
    parts: Mapping[str, Part]
    note: str | None = None
    either: int | str = 0
    on: bool = False
    inner: Part | None = None
    more: tuple[Part, ...] = field(default_factory=tuple)


names = st.text(max_size=6)
numbers = st.floats(allow_nan=False)
parts = st.builds(Part, names, st.lists(st.integers(), max_size=3).map(tuple))
wholes = st.builds(
    Whole,
    numbers,
    st.sampled_from(["eager", "compile"]),
    st.tuples(names, numbers),
    st.dictionaries(names, parts, max_size=2),
    st.none() | names,
    st.integers() | names,
    st.booleans(),
    st.none() | parts,
    st.lists(parts, max_size=2).map(tuple),
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)


def written(whole: Whole) -> Any:
    return json.loads(json.dumps(asdict(whole)))


@given(wholes)
def test_what_was_written_is_read(whole) -> None:
    assert read(Whole, written(whole), "file") == whole


@given(wholes, st.data())
def test_anything_else_is_refused_or_is_of_the_type(whole, data) -> None:
    """Whatever stands where, nothing but PlanError comes out."""
    document = written(whole)
    document[data.draw(st.sampled_from([*document, "other"]))] = data.draw(anything)
    try:
        found = read(Whole, document, "file")
    except PlanError as error:
        assert str(error).startswith("file: ")
        return
    assert read(Whole, written(found), "file") == found


GOOD = Whole(0.5, "eager", ("a", 1.0), {"x": Part("b", (1, 2))})


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("share", "0.5", "share is '0.5'"),
        ("share", True, "share is True"),
        ("share", math.nan, "share is nan"),
        ("share", 10**400, "share is 1000"),
        ("kind", "fast", "kind is 'fast'"),
        ("pair", ["a"], "pair has 1 entries, not 2"),
        ("pair", "ab", "pair is 'ab'"),
        ("parts", {"x": {"sizes": []}}, "parts: 'name' is missing"),
        ("parts", {"x": {"name": "b", "sizes": [1.5]}}, "sizes is 1.5"),
        ("parts", [], "parts is []"),
        ("inner", {"name": "b", "length": 1}, "inner: 'length' is unknown"),
        ("inner", 3, "inner: 3 is no object"),
        ("either", None, "either is None"),
        ("other", 1, "'other' is unknown"),
    ],
)
def test_errors_say_where(name, value, words) -> None:
    with pytest.raises(PlanError) as error:
        read(Whole, {**written(GOOD), name: value}, "file")
    assert words in str(error.value)


def test_what_has_a_default_may_be_missing() -> None:
    needed = {"share": 0, "kind": "eager", "pair": ["a", 1], "parts": {}}
    assert read(Whole, needed, "file") == Whole(0.0, "eager", ("a", 1.0), {})
    with pytest.raises(PlanError, match="'pair' is missing"):
        del needed["pair"]
        read(Whole, needed, "file")


@given(anything)
def test_json_in_a_file_is_read_as_it_is(tmp_path_factory, document) -> None:
    path = tmp_path_factory.mktemp("json") / "it.json"
    path.write_text(json.dumps(document))
    try:
        check_tame(document)
    except PlanError:
        with pytest.raises(PlanError):
            read_json(path)
    else:
        assert json.dumps(read_json(path)) == json.dumps(document)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "Expecting value"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"\xff\xfe{\0}\0", "can't decode"),
        (b'{"a": 1, "b": 2, "a": 1}', "'a' is there twice"),
        (b"9" * 10_000, "digits"),
        (b"[" * 100_000 + b"]" * 100_000, "recursion"),
        (b"[" * 40 + b"]" * 40, "more than 32 levels"),
        (b"[9223372036854775808]", "more than 64 bits"),
        (b'["\\ud800"]', "control characters"),
        (b'{"\\u001b[2J": 0}', "control characters in '"),
        ('{"a": "\u202egnp.exe"}'.encode(), "control characters"),
    ],
)
def test_documents_that_are_not_tame_are_refused(tmp_path: Path, text, words) -> None:
    path = tmp_path / "it.json"
    path.write_bytes(text)
    with pytest.raises(PlanError) as error:
        read_json(path)
    assert words in str(error.value)
    assert str(error.value).isprintable()


def test_what_is_no_regular_file_or_too_large_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no regular file"):
        read_json(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "absent")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(2**27)
    with pytest.raises(PlanError, match="134217728 bytes are more"):
        read_json(tmp_path / "large")
