"""Files as a stranger might have made them, and what rankfold may do when it reads them.

`Reader`s are the ways in. Each has valid files to start from; a `Mutator` spoils them, by a seed;
`answer` reads what came out and says what was wrong with that: an error that is none of rankfold's,
too much time or memory, another file written or read, something run.
"""

import copy
import hashlib
import json
import math
import os
import random
import signal
import sqlite3
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
import typer.main
from rich.text import Text
from safetensors.torch import load
from torch import nn

import rankfold
from rankfold import journal
from rankfold.analysis.latency import LayerTiming, NetworkTiming
from rankfold.analysis.timing_cache import TimingCache
from rankfold.card import model_card
from rankfold.checkpoint import read_record
from rankfold.cli.app import app
from rankfold.elastic import restricted
from rankfold.errors import RankfoldError
from rankfold.measure import Comparison, Measurement
from rankfold.methods import METHODS
from rankfold.narrowing import Kept, Removal, narrow
from rankfold.outlook import look_ahead
from rankfold.record import attach_record, record_of
from rankfold.recover import Recovery
from rankfold.recover.state import Epoch
from rankfold.report.report import facts_of
from rankfold.tables import Shown

Files = Mapping[str, bytes]
SECONDS = 10.0  # of processor time for one document
NAME = "evil_module_of_a_stranger"


class Everything(nn.Module):
    """A layer of each kind that methods take."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(60, 32)
        self.states = nn.LSTM(32, 24, batch_first=True)
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.body = nn.Conv2d(16, 32, 3, padding=1)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.along = nn.Conv1d(16, 24, 3)
        self.head = nn.Linear(24, 64)
        self.out = nn.Linear(64, 48)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        states, _ = self.states(self.embedding(tokens))
        images = torch.relu(self.norm(self.stem(states[:, None])))
        images = self.up(torch.relu(self.grouped(torch.relu(self.body(images)))))
        line = torch.relu(self.along(images.mean(-1))).mean(-1)
        return self.out(torch.relu(self.head(line)))


def make_everything() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Everything().eval()


def tokens() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(60, (4, 8), generator=generator) for _ in range(2)]


# What is there to read.


@dataclass(frozen=True)
class Reader:
    """One way in: valid files by name, and what is done with them in a directory."""

    seeds: tuple[Files, ...]
    read: Callable[[Path], object]


def make_readers(room: Path) -> dict[str, Reader]:
    """All ways in; `room` is for the files to start from."""
    model = make_everything()
    analysis = rankfold.analyze(model, tokens(), metric="weight")
    timed = _timed(rankfold.analyze(model, tokens(), metric="response"))
    small = _with_history(rankfold.factorize(model, analysis.plan(params=0.7)), analysis)
    rankfold.save(small, room / "small", origin={"model": "a:b", "data": f"{NAME}:data"})
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3)).eval()
    images = [torch.randn(2, 3, 9, 9)]
    other = rankfold.factorize(plain, rankfold.analyze(plain, images).plan(fraction=0.5))
    rankfold.save(_cut(other, images[0]), room / "cut")
    timed.save(room / "analysis")
    analysis.plan(params=0.7).save(str(room / "plan.json"))
    with sqlite3.connect(room / "timings.sqlite") as database:
        database.execute("CREATE TABLE timings (key TEXT PRIMARY KEY, milliseconds REAL NOT NULL)")
        database.execute("INSERT INTO timings VALUES ('known', 1.5)")
    database.close()
    tuned = copy.deepcopy(small)
    attach_record(tuned, replace(record_of(tuned), elastic=None))
    rankfold.recover(
        tuned, tokens(), teacher=model, epochs=1, checkpoint=room / "state.safetensors"
    )
    untrained = copy.deepcopy(small)

    def resume(place: Path) -> None:
        again = copy.deepcopy(untrained)
        rankfold.recover(
            again, tokens(), teacher=model, epochs=1, checkpoint=place / "state.safetensors"
        )

    return {
        "model": Reader((_files(room / "small"),), lambda place: _model(place, model)),
        "cut": Reader((_files(room / "cut"),), lambda place: _model(place, plain)),
        "plan": Reader(({"plan.json": (room / "plan.json").read_bytes()},), _plan),
        "analysis": Reader((_files(room / "analysis"),), _analysis),
        "recipe": Reader(tuple({"it.toml": text} for text in RECIPES), _recipe),
        "timings": Reader(({"timings.sqlite": (room / "timings.sqlite").read_bytes()},), _timings),
        "state": Reader(
            ({"state.safetensors": (room / "state.safetensors").read_bytes()},), resume
        ),
    }


RECIPES = (
    b'model = "a.b:c"\ndata = "a.b:d"\nout = "small"\nmacs = 0.3\nkeep = ["head*", "x"]\n',
    b'model = "a.b:c"\nout = "small"\nepochs = 3\nmerge = true\ndistance = "cosine"\nseed = 1\n',
)


def _timed(analysis: rankfold.Analysis) -> rankfold.Analysis:
    """As if each form had taken a time for each rank."""
    layers = []
    for layer in analysis.layers:
        grids = {name: layer.grids[name] for name in {one.method for one in layer.candidates}}
        tables = {name: np.ones(tuple(map(len, grid))) / 2 for name, grid in grids.items()}
        layers.append(replace(layer, timing=LayerTiming(1.0, grids, tables)))
    timing = NetworkTiming(9.0, 1.0, "contiguous", "abacus", 1)
    return replace(analysis, layers=tuple(layers), timing=timing)


def _with_history(small: nn.Module, analysis: rankfold.Analysis) -> nn.Module:
    record = record_of(small)
    sides = (Measurement(9000, 9_000_000, 1.0, 10**6, 0.5), Measurement(5, 5, 0.5, 7, None))
    comparison = Comparison(*sides, 4, 1, "cpu", ("contiguous", "channels_last"), 0.1)
    recovery = Recovery((Epoch(0, None, -1.0), Epoch(1, 0.5, -0.5)), 1, "all epochs done", 1.0)
    history = {"comparison": comparison, "recovery": recovery}
    history |= {"outlook": look_ahead(analysis, points=3), "elastic": restricted(analysis, small)}
    attach_record(small, replace(record, **history))
    return small


def _cut(small: nn.Module, images: torch.Tensor) -> nn.Module:
    """With modules merged and channels taken out."""
    merged = rankfold.merge_adjacent(small, images)
    record = record_of(merged)
    last = next(
        name for name, one in reversed(list(merged.named_modules())) if isinstance(one, nn.Conv2d)
    )
    removal = Removal((Kept(last, outputs=(0, 2, 3)),), len(record.merged))
    narrowed = narrow(merged, removal)
    attach_record(narrowed, replace(record, removed=(removal,)))
    return narrowed


def _files(directory: Path) -> Files:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def _model(place: Path, like: nn.Module) -> None:
    record = read_record(place)
    _show(record.plan, record.comparison)
    json.dumps(facts_of(record, "a network", {}))
    model_card(record, "small")
    loaded = rankfold.load(place, like)
    rankfold.save(loaded, place, force=True)
    if record_of(loaded).elastic is not None:
        rankfold.slice_to(loaded, macs=0.6)


def _show(*tables: object) -> None:
    """Of most no more than what is in them: to lay a table out takes longer than to read a file."""
    for one in tables:
        if isinstance(one, Shown):
            table = one.__rich__()
            for text in (table.title, table.caption):
                if isinstance(text, str):
                    Text.from_markup(text)
            for column in table.columns:
                for cell in column.cells:
                    if isinstance(cell, str):
                        Text.from_markup(cell)


def _plan(place: Path) -> None:
    plan = rankfold.Plan.load(str(place / "plan.json"))
    _show(plan)
    rankfold.factorize(make_everything(), plan)


def _analysis(place: Path) -> None:
    analysis = rankfold.Analysis.load(place)
    _show(analysis, analysis.plan(evbmf=True))
    plan = analysis.plan(macs=0.7, latency=0.9)
    rankfold.factorize(make_everything(), plan, analysis=analysis)


def _recipe(place: Path) -> None:
    """As `rankfold compress --config` reads it; the command itself is another matter."""
    command = typer.main.get_command(app).commands["compress"]  # type: ignore[attr-defined]
    arguments = ["--config", str(place / "it.toml")]
    try:
        command.make_context("compress", arguments)
    except typer.BadParameter.__mro__[1]:  # typer's own UsageError
        return  # which says what is wrong in one line


def _timings(place: Path) -> None:
    cache = TimingCache(place / "timings.sqlite")
    found = cache.get("known")
    assert found is None or 0 < found < math.inf, found
    cache.put("new", 2.5)
    assert cache.get("new") == 2.5


# What is done to it.

_DIGITS, _DEEP, _NAN, _HUGE, _TWICE = "@digits@", "@deep@", "@nan@", "@huge@", "@twice@"
_LITERALS = {
    _DIGITS: "9" * 20_000,
    _DEEP: "[" * 20_000 + "]" * 20_000,
    _NAN: "NaN",
    _HUGE: "1e999",
}
_TEXTS = (
    *("", "__class__", "forward", "weight", "..", "../../etc/passwd", "/etc/passwd", "\ud800"),
    *("\x1b[2J\x1b]0;x\x07", "\u202etxt", "[/foo]", "[link=x]y", "<script>", "\0", "\ufeff"),
    *("os:abort", f"{NAME}:main", "a" * 5000, "head", "stem", "body", "body.0", "x.y", "stem."),
    *("NaN", "inf", "float32", "F64", "I8", "BOOL", "F8_E5M2", "C64", "{0.__class__}", "%s%n"),
)
_NUMBERS: tuple[Any, ...] = (
    *(0, -1, 1, 2, 3, 7, 8, 16, 17, 255, 10**6, 10**9, 2**31, 2**53, 2**63 - 1, 2**63, -(2**63)),
    *(2**64, 10**30, 10**400, 0.0, -0.0, 0.5, 1.5, 1e-320, 1e308, -1e308, 1e17),
)
_OTHERS: tuple[Any, ...] = (
    *(None, True, False, [], {}, [[]], [{}], [None], {"": None}, [1] * 64, _DIGITS, _DEEP, _NAN),
    *(_HUGE, [_NAN] * 3, [[_DIGITS]], [_HUGE]),
)
_SETTINGS = sorted({name for one in METHODS.values() for name in one.__dataclass_fields__})


@dataclass(frozen=True)
class Mutator:
    """Spoils files, in the same way for the same seed."""

    random: random.Random

    def spoil(self, files: Files) -> dict[str, bytes]:
        """Some files changed; the weights' hash is mostly set right, as a stranger would."""
        found = dict(files)
        name = self.random.choice(sorted(found))
        for _ in range(self.random.choice((1, 1, 1, 2, 4))):
            found[name] = self._file(name, found[name])
        if "model.safetensors" in found and self.random.random() < 0.95:
            found["plan.json"] = _hashed(found["plan.json"], found["model.safetensors"])
        if name == "state.safetensors" and self.random.random() < 0.95:
            found[name] = _sealed(found[name])
        return found

    def _file(self, name: str, data: bytes) -> bytes:
        if self.random.random() < 0.15:
            return self.raw(data)
        if name.endswith(".json"):
            return self.document(data)
        if name.endswith(".safetensors"):
            return self.tensors(data)
        if name.endswith(".toml"):
            return self.recipe(data)
        return self.raw(data)

    def raw(self, data: bytes) -> bytes:
        pick = self.random
        place = pick.randrange(len(data) + 1)
        length = pick.choice((1, 1, 2, 8, 64, 1000))
        match pick.randrange(8):
            case 0:
                return data[:place]
            case 1:
                return data[place:]
            case 2:
                return pick.choice(
                    (b"", b"\xef\xbb\xbf" + data, data.decode("latin1").encode("utf-16"))
                )
            case 3:
                return data[:place] + data[place + length :]
            case 4:
                return data[:place] + pick.randbytes(length) + data[place + length :]
            case 5:
                return data[:place] + data[place : place + length] * 3 + data[place + length :]
            case 6:
                return (
                    data[:place]
                    + pick.choice((b"\0", b"\xff", b'"', b"{", b"[", b"9"))
                    + data[place:]
                )
            case _:
                changed = bytearray(data or b"\0")
                for _ in range(pick.choice((1, 4, 16))):
                    changed[pick.randrange(len(changed))] ^= 1 << pick.randrange(8)
                return bytes(changed)

    def document(self, data: bytes) -> bytes:
        """JSON changed as a tree, or its bytes if it is none any more."""
        try:
            tree = json.loads(data)
        except (ValueError, RecursionError):
            return self.raw(data)
        return _text(self.tree(tree)).encode()

    def tree(self, tree: Any) -> Any:
        if isinstance(tree, dict) and self.random.random() < 0.3:
            self._choices(tree)
            return tree
        places = list(_places(tree))
        if not places:
            return self.value()
        # Few places are deep in lists of numbers, which most of a document is.
        kinds = sorted({path for _, _, path in places})
        path = self.random.choice(kinds)
        holder, key, _ = self.random.choice([place for place in places if place[2] == path])
        old = holder[key]
        match self.random.randrange(9):
            case 0 | 1 | 2:
                holder[key] = self.value()
            case 3:
                del holder[key]
            case 4:
                holder[key] = copy.deepcopy(self.random.choice(places)[0])
            case 5 if isinstance(holder, dict):
                holder[self.text()] = holder.pop(key)
            case 5 | 6 if isinstance(holder, list):
                holder.extend([old] * self.random.choice((1, 2, 100)))
            case 6:
                holder[f"{_TWICE}{key}"] = self.value()
            case 7 if type(old) in (int, float):
                holder[key] = self.random.choice(
                    (-old, old + 1, old - 1, old * 1e6, old * 2, float(old))
                )
            case _:
                other, place, _ = self.random.choice(places)
                holder[key], other[place] = other[place], holder[key]
        return tree

    def _choices(self, document: dict[str, Any]) -> None:
        """Another method, rank or setting, somewhere a layer is planned or was analysed."""
        pick = self.random
        found = [one for one in _objects(document) if {"method", "settings", "rank"} <= one.keys()]
        if found:
            one = pick.choice(found)
            if pick.random() < 0.7 or one["method"] is None:
                one["method"] = pick.choice((*METHODS, *_TEXTS))
                one["settings"] = {}
                one["rank"] = [pick.choice(_NUMBERS[2:9]) for _ in range(pick.randint(1, 4))]
            if pick.random() < 0.5:
                one["settings"] = self.settings()
            if pick.random() < 0.5:
                one["rank"] = [pick.choice(_NUMBERS) for _ in range(pick.randint(0, 5))]
            return
        found = [one for one in _objects(document) if "settings" in one]
        if found:
            pick.choice(found)["settings"] = self.settings()

    def settings(self) -> dict[str, Any]:
        names = self.random.sample(_SETTINGS, self.random.choice((1, 1, 2, 3)))
        return {name: self.value() for name in names}

    def value(self) -> Any:
        kind = self.random.choice((_TEXTS, _NUMBERS, _NUMBERS, _OTHERS))
        return copy.deepcopy(self.random.choice(kind))

    def text(self) -> str:
        return self.random.choice(_TEXTS)

    def tensors(self, data: bytes) -> bytes:
        """A safetensors file of another header, other numbers, or a length that lies."""
        pick = self.random
        try:
            (length,) = struct.unpack("<Q", data[:8])
            header, body = data[8 : 8 + length], data[8 + length :]
            tree = json.loads(header)
        except (ValueError, struct.error, RecursionError):
            return self.raw(data)
        match pick.randrange(5):
            case 0:
                length = pick.choice(
                    (0, 1, length - 1, length + 1, length * 2, 2**31, 2**63, 2**64 - 1)
                )
                return struct.pack("<Q", length) + header + body
            case 1:
                number = pick.choice((math.nan, math.inf, -math.inf, 3e38, 1e-45))
                whole = struct.pack("<f", number)
                place = 4 * pick.randrange(max(1, len(body) // 4))
                many = pick.choice((1, 8, len(body) // 4))
                body = body[:place] + (whole * many)[: len(body) - place] + body[place + 4 * many :]
            case 2:
                body = self.raw(body)
            case 3:
                one = pick.choice(
                    [entry for entry in tree.values() if isinstance(entry, dict)] or [{}]
                )
                match pick.randrange(3):
                    case 0:
                        one["dtype"] = pick.choice(
                            ("F64", "I32", "BF16", "F16", "BOOL", "F8_E4M3", "X")
                        )
                    case 1:
                        one["shape"] = [pick.choice(_NUMBERS) for _ in range(pick.randint(0, 4))]
                    case _:
                        one["data_offsets"] = [pick.choice(_NUMBERS) for _ in range(2)]
            case 4 if "document" in tree.get("__metadata__", {}):
                about = tree["__metadata__"]
                about["document"] = self.document(about["document"].encode()).decode()
            case _:
                tree = self.tree(tree)
        header = _text(tree).encode()
        return struct.pack("<Q", len(header)) + header + body

    def recipe(self, data: bytes) -> bytes:
        pick = self.random
        lines = data.decode("utf-8", "replace").splitlines() or [""]
        place = pick.randrange(len(lines))
        name = lines[place].partition(" = ")[0]
        value = pick.choice(
            (
                *('""', "nan", "-inf", "9" * 20_000, "1e999", "true", "1979-05-27", "[]", "[[]]"),
                *(
                    "{}",
                    "[" * 5000 + "]" * 5000,
                    "{a." + "b." * 3000 + "c = 1}",
                    "0xff",
                    '["x", 1]',
                ),
                *('"\\u0000"', '"\\u001b[2J"', "'''x\ny'''", str(2**64), "-1", f'"{NAME}:f"', "0"),
            )
        )
        key = pick.choice((name, name, name, *_RECIPE_NAMES))
        match pick.randrange(4):
            case 0:
                lines.insert(place, f"{key} = {value}")
            case 1:
                lines.insert(
                    place, pick.choice(("[table]", "[[x]]", "a" * 9999, "= 1", "x.y.z = 1"))
                )
            case _:
                lines[place] = f"{key} = {value}"
        return "\n".join(lines).encode()


_RECIPE_NAMES = (
    *("config", "save-recipe", "__class__", "help", "threads", "device", "elastic", "tensorboard"),
    *("macs", "keep", "distance", "seed", "methods", "latency", "learning-rate", "json", '"a b"'),
)


def _hashed(plan: bytes, weights: bytes) -> bytes:
    """The plan document with the hash of these weights, if it is one that has a hash."""
    try:
        document = json.loads(plan)
        document["weights_sha256"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return plan
    old = json.dumps(document["weights_sha256"]).encode()
    return plan.replace(old, json.dumps(hashlib.sha256(weights).hexdigest()).encode())


def _sealed(entry: bytes) -> bytes:
    """An entry of a journal with the hash that belongs to what is in it now, if it is one."""
    try:
        tensors = load(entry)
        (length,) = struct.unpack("<Q", entry[:8])
        header = json.loads(entry[8 : 8 + length])
        about = header["__metadata__"]
        ordered = [tensors[str(index)] for index in range(len(tensors))]
        about["sha256"] = journal._digest(about["document"], ordered)
    except Exception:  # it is none any more
        return entry
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + entry[8 + length :]


def _text(tree: Any) -> str:
    """JSON, with what `json.dumps` would not write put in afterwards."""
    text = json.dumps(tree)
    for mark, literal in _LITERALS.items():
        text = text.replace(f'"{mark}"', literal)
    return text.replace(_TWICE, "")


def _places(tree: Any, path: str = "") -> Iterator[tuple[Any, Any, str]]:
    """Every place in a tree: what holds it, its key there, and a path, alike within lists."""
    keys: Sequence[Any] = ()
    if isinstance(tree, dict):
        keys = list(tree)
    elif isinstance(tree, list):
        keys = range(len(tree))
    for key in keys:
        below = f"{path}.{key if isinstance(key, str) else ''}"
        yield tree, key, below
        if len(below) < 400:
            yield from _places(tree[key], below)


def _objects(tree: Any) -> Iterator[dict[str, Any]]:
    if isinstance(tree, dict):
        yield tree
    for holder, key, _ in list(_places(tree)):
        if isinstance(holder[key], dict):
            yield holder[key]


# What it may do.


class TooSlow(BaseException):
    """More than `SECONDS` of processor time."""


@dataclass(frozen=True)
class Answer:
    """Whether the files were read, or refused, and what was wrong with how that went."""

    accepted: bool
    wrong: str | None = None


def answer(reader: Reader, files: Files, link: str | None = None) -> Answer:
    """Read the files, in a new directory.

    `link`, the name of one of the files, is then a link to a file elsewhere.
    """
    with tempfile.TemporaryDirectory() as room, tempfile.TemporaryDirectory() as elsewhere:
        place, canary = Path(room) / "there", Path(elsewhere) / "canary"
        place.mkdir()
        for name, data in files.items():
            (place / name).write_bytes(data)
        canary.write_bytes(files.get(link or "", b"nothing of yours"))
        if link is not None:
            (place / link).unlink(missing_ok=True)
            (place / link).symlink_to(canary)
        before = canary.read_bytes()
        found = _watched(lambda: reader.read(place), Path(room))
        around = sorted(one.name for one in (*Path(room).iterdir(), *Path(elsewhere).iterdir()))
        if around != ["canary", "there"] or canary.read_bytes() != before:
            found = Answer(found.accepted, found.wrong or f"files around it: {around}")
    return found


def _watched(read: Callable[[], object], room: Path) -> Answer:
    start = time.process_time()
    try:
        with _limited(), _listening(room) as heard:
            read()
    except RankfoldError as error:
        told = str(error)
        if len(told) > 2000:
            return Answer(False, f"{len(told)} characters of message")
        if any((one < " " and one not in "\n\t") or "\ud800" <= one <= "\udfff" for one in told):
            return Answer(False, f"an error that cannot be printed: {told!a:.200}")
        return Answer(False, heard[0] if heard else None)
    except TooSlow:
        return Answer(False, "too slow")
    except BaseException as error:
        where = error.__traceback__
        while where is not None and where.tb_next is not None:
            where = where.tb_next
        code = where.tb_frame.f_code if where else None
        line = f"{Path(code.co_filename).name}:{where.tb_lineno}" if code and where else ""
        return Answer(False, f"{type(error).__name__} at {line}: {error!s:.200}")
    if time.process_time() - start > SECONDS:
        return Answer(True, "too slow")
    return Answer(True, heard[0] if heard else None)


@contextmanager
def _limited() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


_FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork")
_FORBIDDEN += ("socket.connect", "socket.getaddrinfo", "pickle.find_class", "ctypes.dlopen")
_CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod")
_listeners: list[Callable[[str, tuple[Any, ...]], None]] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    for listener in _listeners:
        listener(event, arguments)


@contextmanager
def _listening(room: Path) -> Iterator[list[str]]:
    """Within: what is run, written or changed outside of the room is heard."""
    heard: list[str] = []

    def listen(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _FORBIDDEN or (event == "import" and arguments[0] == NAME):
            heard.append(f"{event} {arguments!r:.120}")
        writes = event in _CHANGES or (event == "open" and _writes(arguments))
        if writes and isinstance(arguments[0], str | os.PathLike):
            path = Path(arguments[0])
            inside = str(path.absolute()).startswith(str(room))
            if not inside and path != Path(os.devnull) and path.is_absolute():
                heard.append(f"{event} {path}")

    if not _hooked:
        sys.addaudithook(_hook)
        _hooked.append(True)
    _listeners.append(listen)
    try:
        yield heard
    finally:
        _listeners.remove(listen)


_hooked: list[bool] = []


def _writes(arguments: tuple[Any, ...]) -> bool:
    _, mode, flags = arguments
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


# Of all files, in percent.
SHARES = {"model": 25, "plan": 30, "cut": 29, "analysis": 6, "recipe": 4, "timings": 3, "state": 3}


def case_of(
    readers: Mapping[str, Reader], seed: int, only: str | None = None
) -> tuple[str, Files, str | None]:
    """The way in, files and link of one seed."""
    pick = random.Random(seed)
    name = only or pick.choices(list(SHARES), list(SHARES.values()))[0]
    files = Mutator(pick).spoil(pick.choice(readers[name].seeds))
    link = pick.choice(sorted(files)) if pick.random() < 0.01 else None
    if name == "timings":  # the user's own, wherever it is linked to
        link = None
    return name, files, link
