"""What is finished of a long piece of work, on disk, so that a killed process goes on from there.

A journal is a directory:

    request.json        what the work was asked for, stage by stage
    lock, holder.json   which process is at it; the system frees the lock of one that is killed
    <stage>/            entries, each a safetensors file of nested JSON primitives and tensors

An entry takes its place by a rename when it has reached the disk. One that is damaged counts as not
there, and is made again. Nothing is unpickled.
"""

import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rankfold import processes
from rankfold.documents import read_json
from rankfold.errors import CheckpointError, JournalError, PlanError
from rankfold.files import replace_file
from rankfold.progress import Progress, silent

T = TypeVar("T")
R = TypeVar("R")

Pathlike = str | os.PathLike[str]
Request = Mapping[str, Mapping[str, str]]  # by stage, in their order: what it depends on, by name

# Stages of a compression.
ANALYSIS = "analysis"
FACTORS = "factors"  # layers that have been factorized
NETWORK = "network"  # what depends on the budget and on recovery

FORMAT_VERSION = 1
REQUEST, LOCK, HOLDER = "request.json", "lock", "holder.json"


def _as_it_is(value: Any) -> Any:
    return value


def _second(item: Any, value: Any) -> Any:
    return value


class Journal:
    """Pieces of work by name, each done once: `Journal(directory)`, held `with` it by one process.

    `Journal()` keeps nothing, so that work is written in one way with a journal or without. Of
    several processes that work together the first holds it, reads and writes for all. Those that
    see the same directory write their shares of what is shared out themselves, as soon as each
    piece is made: whichever is killed, nothing finished is lost. Whether a piece is read or made
    leaves torch's random numbers (on the CPU) as they were.
    """

    def __init__(self, directory: Pathlike | None = None) -> None:
        self.directory = None if directory is None else Path(directory)
        self._lock: FileLock | None = None
        self._begun = False
        self._shares = False  # whether this process sees the directory that the first one holds

    def __enter__(self) -> Self:
        """Raises JournalError if another process holds it, or the directory is something else."""
        if self.directory is not None:
            processes.from_first(self._claim)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Let other processes have it; a journal without any entry leaves nothing behind."""
        self._begun = self._shares = False
        if self._lock is None or self.directory is None:
            return
        if not any(one.is_dir() for one in self.directory.glob("*")):
            shutil.rmtree(self.directory, ignore_errors=True)
        self._lock.release()
        self._lock = None

    def begin(self, make_request: Callable[[], Request], force: bool = False) -> None:
        """Go on with what was asked for; its stages follow one another, each from those before.

        A journal of something else is refused with a JournalError; with `force` what was made for
        another request is thrown away, from the first stage that differs. What was begun stays.
        """
        if self.directory is not None and not self._begun:
            self._begun = True
            processes.from_first(lambda: self._begin(make_request(), force))
            holder = processes.from_first(lambda: self._read_json(HOLDER))
            self._shares = holder == self._read_json(HOLDER)

    def once(
        self,
        name: str,
        make: Callable[[], T],
        pack: Callable[[T], Any] = _as_it_is,
        unpack: Callable[[Any], T] = _as_it_is,
    ) -> T:
        """What `make` gives: read where it is there, else made and kept.

        JSON primitives and tensors, or what `pack` makes such of, and `unpack` what it was; an
        entry that `unpack` refuses with a CheckpointError counts as not there. The name begins with
        the stage, "stage/what". Raises CheckpointError if it cannot be written.
        """
        if self.directory is not None:
            for known in processes.from_first(lambda: self._found(name, unpack)):
                return known
        with torch.random.fork_rng(devices=[]):
            made = make()
        if self._lock is not None:
            self._write(name, made, pack)
        return made

    def shared_out(
        self,
        names: Sequence[str],
        items: Sequence[T],
        work: Callable[[T], R],
        progress: Progress = silent,
        description: str = "",
        pack: Callable[[R], Any] = _as_it_is,
        unpack: Callable[[T, Any], R] = _second,
    ) -> list[R]:
        """`work(item)` of every item, each `once`; what is not there is shared by the processes.

        Here `unpack` is given the item too.
        """
        known: dict[int, R] = {}
        if self.directory is not None:
            known = processes.from_first(
                lambda: {
                    place: found
                    for place, one in enumerate(names)
                    for found in self._found(one, partial(unpack, items[place]))
                }
            )
        left = [place for place in range(len(items)) if place not in known]

        def do(place: int) -> R:
            with torch.random.fork_rng(devices=[]):
                made = work(items[place])
            if self._lock is not None or self._shares:
                self._write(names[place], made, pack)
            return made

        known |= zip(left, processes.shared_out(left, do, progress, description), strict=True)
        if processes.count() > 1:
            for place in left:  # those of processes that do not see the directory
                if self._lock is not None and not self._place(names[place]).exists():
                    self._write(names[place], known[place], pack)
        return [known[place] for place in range(len(items))]

    def kept(self, name: str) -> Any:
        """An entry; None if there is none."""
        if self.directory is None:
            return None
        found = processes.from_first(lambda: self._found(name, _as_it_is))
        return found[0] if found else None

    def path(self, name: str) -> Path | None:
        """Where something that is no entry has its place, a directory for one; None: nowhere."""
        if self.directory is None:
            return None
        return self.directory / name

    def sound(self, name: str) -> Path | None:
        """The path of an entry that others read and write, removed if it is damaged."""
        path = self.path(name)
        return None if path is None else processes.from_first(lambda: _removed_if_damaged(path))

    def forget(self, name: str) -> None:
        """Throw away an entry, what is at a path, or a whole stage."""
        if self._lock is not None and self.directory is not None:
            _remove(self._place(name))
            _remove(self.directory / name)

    def remove(self) -> None:
        """The work is done: leave nothing behind. The lock is held until the end."""
        if self._lock is not None and self.directory is not None:
            for one in self.directory.glob("*"):
                if one.name != LOCK:
                    _remove(one)

    def _place(self, name: str) -> Path:
        assert self.directory is not None
        folder, _, what = name.rpartition("/")
        return self.directory / folder / f"{hashlib.sha256(what.encode()).hexdigest()[:32]}.entry"

    def _found(self, name: str, unpack: Callable[[Any], T]) -> list[T]:
        """The entry, or nothing."""
        try:
            return [unpack(read_entry(self._place(name)))]
        except CheckpointError:
            return []

    def _write(self, name: str, made: T, pack: Callable[[T], Any]) -> None:
        write_entry(self._place(name), pack(made))

    def _claim(self) -> None:
        assert self.directory is not None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            inside = {one.name for one in self.directory.iterdir()}
            if inside and LOCK not in inside:
                raise JournalError(
                    f"{self.directory} exists and is no journal: choose another directory"
                )
            lock = FileLock(self.directory / LOCK)
            lock.acquire(blocking=False)
        except Timeout as error:
            raise JournalError(
                f"{self.directory} is in use by {self._holder()}: wait until it ends, or choose "
                "another directory"
            ) from error
        except OSError as error:
            raise _cannot_write(self.directory, error) from error
        self._lock = lock
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.ctime()}
        self._write_json(HOLDER, holder)

    def _holder(self) -> str:
        about = self._read_json(HOLDER)
        try:
            return f"process {about['pid']} on {about['host']} since {about['since']}"
        except (KeyError, TypeError):  # it has only just begun
            return "another process"

    def _begin(self, request: Request, force: bool) -> None:
        assert self.directory is not None
        known = self._known_request()
        asked = {stage: dict(about) for stage, about in request.items()}
        stages = list(asked)
        same = 0
        while same < len(stages) and known.get(stages[same]) == asked[stages[same]]:
            same += 1
        # A stage that was not begun is nobody's; those before it may be.
        if not force and any(stage in known for stage in stages[same:]):
            stage = next(stage for stage in stages[same:] if stage in known)
            raise JournalError(
                f"{self.directory} is the journal of other work: "
                f"{_differences(known[stage], asked[stage])}. Finish that, remove the directory, "
                "or pass --force (force=True) to begin anew"
            )
        if same == len(stages):  # what others do from here on stays
            return
        for one in self.directory.glob("*"):
            if one.is_dir() and one.name not in stages[:same]:
                _remove(one)
        self._write_json(REQUEST, {"format_version": FORMAT_VERSION, "stages": asked})

    def _known_request(self) -> dict[str, dict[str, str]]:
        """What the journal is of; of nothing, if that cannot be read."""
        document = self._read_json(REQUEST)
        try:
            stages = document["stages"]
            is_known = document["format_version"] == FORMAT_VERSION and isinstance(stages, dict)
            return stages if is_known and all(isinstance(s, dict) for s in stages.values()) else {}
        except (KeyError, TypeError):
            return {}

    def _read_json(self, name: str) -> Any:
        """A document in the directory; None if it cannot be read."""
        assert self.directory is not None
        try:
            return read_json(self.directory / name)
        except (OSError, PlanError):
            return None

    def _write_json(self, name: str, document: Any) -> None:
        assert self.directory is not None
        text = json.dumps(document, indent=1)

        def write(path: Path) -> None:
            path.write_text(text, encoding="utf-8")
            _flush(path)

        try:
            replace_file(self.directory / name, write)
        except OSError as error:
            raise _cannot_write(self.directory / name, error) from error


@contextmanager
def opened(
    journal: Journal | Pathlike | None, make_request: Callable[[], Request], force: bool = False
) -> Iterator[Journal]:
    """Within: a journal of this request, in a directory or one that is held; None: of nothing."""
    if isinstance(journal, Journal):
        journal.begin(make_request, force)
        yield journal
        return
    with Journal(journal) as own:
        own.begin(make_request, force)
        yield own


def write_entry(path: Path, value: Any) -> None:
    """Write nested JSON primitives, tuples, mappings and tensors as one file, whole or not at all.

    Raises CheckpointError if it cannot be written, TypeError for a value of another kind.
    """
    tensors: list[torch.Tensor] = []
    document = json.dumps(_encoded(value, tensors))
    about = {"document": document, "sha256": _digest(document, tensors)}

    def write(place: Path) -> None:
        save_file({str(index): one for index, one in enumerate(tensors)}, place, about)
        _flush(place)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, write)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(path, error) from error


def read_entry(path: Path) -> Any:
    """What `write_entry` wrote, tensors on the CPU; raises CheckpointError for anything else."""
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata()
            # Copies: what lies in the file is not aligned as what torch makes, by which products
            # may come out another way in their last digit.
            tensors = [file.get_tensor(str(index)).clone() for index in range(len(file.keys()))]
        if about["sha256"] != _digest(about["document"], tensors):
            raise CheckpointError(f"{path} is damaged: its SHA-256 is another")
        return _decoded(json.loads(about["document"]), tensors)
    except CheckpointError:
        raise
    except Exception as error:  # safetensors raises errors of many kinds for files of others
        raise CheckpointError(f"{path} is missing or damaged: {error!r:.200}") from error


def _removed_if_damaged(path: Path) -> Path:
    if path.exists():
        try:
            read_entry(path)
        except CheckpointError:
            path.unlink(missing_ok=True)
    return path


def _encoded(value: Any, tensors: list[torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        kept = value.detach().cpu()
        tensors.append(kept.clone(memory_format=torch.contiguous_format))
        return {"tensor": len(tensors) - 1, "strides": _strides(kept)}
    if isinstance(value, Mapping):
        items = [[_encoded(key, tensors), _encoded(one, tensors)] for key, one in value.items()]
        return {"mapping": items}
    if isinstance(value, tuple):
        return {"tuple": [_encoded(one, tensors) for one in value]}
    if isinstance(value, list):
        return [_encoded(one, tensors) for one in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a {type(value).__name__} is nothing that a journal keeps")


def _decoded(document: Any, tensors: Sequence[torch.Tensor]) -> Any:
    if isinstance(document, list):
        return [_decoded(one, tensors) for one in document]
    if not isinstance(document, dict):
        return document
    if "tensor" in document:
        found, strides = tensors[document["tensor"]], document["strides"]
        if strides is None:
            return found
        return torch.empty_strided(found.shape, strides, dtype=found.dtype).copy_(found)
    if "tuple" in document:
        return tuple(_decoded(one, tensors) for one in document["tuple"])
    return {_decoded(k, tensors): _decoded(one, tensors) for k, one in document["mapping"]}


def _strides(tensor: torch.Tensor) -> list[int] | None:
    """Those of a gapless tensor that is not stored row-major: they decide which kernels run."""
    gapless = torch.empty_like(tensor, device="meta", memory_format=torch.preserve_format).stride()
    return None if gapless == torch.empty(tensor.shape, device="meta").stride() else list(gapless)


def _digest(document: str, tensors: Sequence[torch.Tensor]) -> str:
    digest = hashlib.sha256(document.encode())
    for one in tensors:
        digest.update(f"{one.dtype} {tuple(one.shape)}".encode())
        digest.update(one.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _differences(known: Mapping[str, str], asked: Mapping[str, str]) -> str:
    """In words; of what is known by its SHA-256 alone, only that it is another."""
    found = []
    for name in dict.fromkeys([*known, *asked]):
        before, now = known.get(name), asked.get(name)
        if before == now:
            continue
        if before is not None and now is not None and len(before) == len(now) == 64:
            found.append(f"its {name} is another")
        else:
            told = ["not given" if one is None else f"{one:.60}" for one in (before, now)]
            found.append(f"{name} was {told[0]}, is {told[1]}")
    return ", ".join(found)


def _cannot_write(path: Path, error: Exception) -> CheckpointError:
    reason = getattr(error, "strerror", None) or error
    return CheckpointError(f"{path} cannot be written: {reason}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
