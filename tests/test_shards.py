"""Safetensors in one file or several."""

import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankfold.errors import CheckpointError
from rankfold.shards import INDEX, SINGLE, Shards, grouped, shard_name, write_index, write_shard


@given(st.lists(st.integers(0, 50), max_size=20), st.integers(1, 60))
def test_groups_keep_the_order_and_the_limit(sizes, limit) -> None:
    named = {str(place): size for place, size in enumerate(sizes)}
    groups = list(grouped(named, limit))
    assert [name for group in groups for name in group] == list(named)
    assert all(group for group in groups)
    for group, following in itertools.pairwise(groups):
        total = sum(named[name] for name in group)
        assert total <= limit or len(group) == 1
        assert total + named[following[0]] > limit


def in_two_files(place) -> dict[str, torch.Tensor]:
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(2), "c.d": torch.ones(5).bfloat16()}
    first, second = shard_name(0, 2), shard_name(1, 2)
    write_shard({"a": tensors["a"].T.contiguous().T}, place / first)
    write_shard({name: tensors[name] for name in ("b", "c.d")}, place / second)
    write_index(place, {first: ["a"], second: ["b", "c.d"]}, 66)
    return tensors


def test_what_is_written_is_read(tmp_path) -> None:
    tensors = in_two_files(tmp_path)
    shards = Shards.of(tmp_path)
    assert shards.file_of.keys() == tensors.keys() and len(shards.files) == 2
    for name, tensor in tensors.items():
        found = shards.tensor(name)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor)
    alone = tmp_path / "alone"
    alone.mkdir()
    write_shard(tensors, alone / SINGLE)
    assert torch.equal(Shards.of(alone).tensor("a"), tensors["a"])


def test_what_is_missing_or_lies_elsewhere_is_an_error(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="neither"):
        Shards.of(tmp_path)
    in_two_files(tmp_path)
    with pytest.raises(CheckpointError, match="no tensor 'z'"):
        Shards.of(tmp_path).tensor("z")
    index = tmp_path / INDEX
    whole = json.loads(index.read_text())
    for file in ("../x.safetensors", "/etc/x.safetensors", ".safetensors", "x.bin", 3):
        index.write_text(json.dumps({**whole, "weight_map": {"a": file}}))
        with pytest.raises(CheckpointError, match="names no files beside it"):
            Shards.of(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "x.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"lacks x\.safetensors"):
        Shards.of(tmp_path)
    index.write_text(json.dumps(whole))
    for damage in (b"", b"\xff" * 40):
        (tmp_path / shard_name(0, 2)).write_bytes(damage)
        with pytest.raises(CheckpointError, match="is damaged"):
            Shards.of(tmp_path).tensor("a")
    index.write_text("[]")
    with pytest.raises(CheckpointError, match="weight_map"):
        Shards.of(tmp_path)
