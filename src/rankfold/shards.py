"""Safetensors in several files: read a tensor at a time from where they lie, written in turn.

The layout is that of Hugging Face: files and an index, model.safetensors.index.json, that names the
file of each tensor; a model in one file, model.safetensors, has no index.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rankfold.documents import read_json
from rankfold.errors import CheckpointError, PlanError
from rankfold.files import replace_file

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"[\w-][\w.-]*\.safetensors")
"""What the files may be called: nothing that lies elsewhere."""


@dataclass(frozen=True)
class Shards:
    """Tensors in files of one directory."""

    directory: Path
    file_of: Mapping[str, str]  # by the name of a tensor

    @staticmethod
    def of(directory: str | os.PathLike[str]) -> "Shards":
        """Those of a model's directory; raises CheckpointError, saying what is wrong with it."""
        place = Path(directory)
        if (place / INDEX).is_file():
            return Shards(place, _read_index(place / INDEX))
        if not (place / SINGLE).is_file():
            raise CheckpointError(f"{place} has neither {INDEX} nor {SINGLE}")
        with _opened(place / SINGLE) as file:
            return Shards(place, dict.fromkeys(file.keys(), SINGLE))

    @property
    def files(self) -> list[Path]:
        """All of them, in the order of their names."""
        return [self.directory / name for name in sorted(set(self.file_of.values()))]

    def tensor(self, name: str) -> torch.Tensor:
        """One of them, backed by its file: what is not read of it takes no memory.

        Raises CheckpointError if it is not there.
        """
        if name not in self.file_of:
            raise CheckpointError(f"{self.directory} has no tensor '{name}'")
        path = self.directory / self.file_of[name]
        with _opened(path) as file:
            try:
                found: torch.Tensor = file.get_tensor(name)
            except SafetensorError as error:
                raise CheckpointError(f"{path} is damaged: {error}") from error
        return found


def write_shard(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """One file of them, replaced at once, on disk when this returns."""

    def write(beside: Path) -> None:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside)
        beside.chmod(0o644)  # safetensors makes it private
        with beside.open("rb") as file:
            os.fsync(file.fileno())

    replace_file(path, write)


def write_index(directory: Path, shards: Mapping[str, Iterable[str]], total_bytes: int) -> None:
    """The index of files by their names, each with the names of its tensors."""
    file_of = {name: file for file, names in shards.items() for name in names}
    document = {"metadata": {"total_size": total_bytes}, "weight_map": file_of}
    text = json.dumps(document, indent=1)
    replace_file(directory / INDEX, lambda path: path.write_text(text, encoding="utf-8"))


def grouped(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
    """Names in their order, in groups of at most so many bytes; a larger one is a group alone."""
    group: list[str] = []
    filled = 0
    for name, size in sizes.items():
        if group and filled + size > limit:
            yield group
            group, filled = [], 0
        group.append(name)
        filled += size
    if group:
        yield group


def shard_name(index: int, count: int) -> str:
    """Of the file number `index`, from 0 on, of so many."""
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _read_index(path: Path) -> dict[str, str]:
    try:
        document = read_json(path)
    except (OSError, PlanError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    found = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(found, dict) or not all(
        isinstance(file, str) and SHARD.fullmatch(file) for file in found.values()
    ):
        raise CheckpointError(f"{path} is damaged: 'weight_map' names no files beside it")
    for file in set(found.values()):
        if not (path.parent / file).is_file():
            raise CheckpointError(f"{path.parent} lacks {file}, which {path.name} names")
    return found


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
