from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import make_dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rankfold.batches import (
    all_finite,
    batch_size,
    device_of,
    first_batches,
    held_out_first,
    run,
    run_or_explain,
    running,
    split_batch,
    tensors_of,
    to_device,
    uncompiled,
)
from rankfold.errors import CalibrationError, ModelError

CPU = torch.device("cpu")
x, y = torch.ones(3, 2), torch.zeros(3)


class Adds(nn.Module):
    def forward(self, first: torch.Tensor, second: torch.Tensor | float = 1.0) -> torch.Tensor:
        return first + second


@pytest.mark.parametrize(
    ("batch", "label", "output"),
    [
        (x, None, x + 1),
        ((x,), None, x + 1),
        ([x, y], y, x + 1),
        (((x, x), y), y, x + x),
        ({"first": x, "second": x}, None, x + x),
        ({"first": x, "labels": y}, y, x + 1),
        (({"first": x, "second": x}, y), y, x + x),
    ],
)
def test_what_is_input_and_what_is_label(batch, label, output) -> None:
    assert split_batch(batch)[1] is label
    assert torch.equal(run(Adds(), batch), output)
    assert batch_size(batch) == 3


@pytest.mark.parametrize("batch", [(x, x, y), [], "text", 3, None])
def test_other_batches_are_refused(batch) -> None:
    with pytest.raises(CalibrationError, match="pass forward="):
        split_batch(batch)


def test_nests_are_moved_and_keep_their_kind() -> None:
    Pair = namedtuple("Pair", "left right")
    batch = {"a": [x, (y, 3)], "b": Pair(x, None), "c": OrderedDict(d=y)}
    moved = to_device(batch, torch.device("meta"))
    assert moved["a"][0].is_meta and moved["a"][1][0].is_meta and moved["a"][1][1] == 3
    assert isinstance(moved["b"], Pair) and moved["b"].left.is_meta and moved["b"].right is None
    assert isinstance(moved["c"], OrderedDict) and moved["c"]["d"].is_meta


def test_mappings_that_are_not_made_from_a_dict_are_moved() -> None:
    moved = to_device(defaultdict(list, a=x), torch.device("meta"))
    assert isinstance(moved, defaultdict) and moved["a"].is_meta and moved["missing"] == []


def test_dataclasses_are_moved() -> None:
    Batch = make_dataclass("Batch", ["pixels", "name"])
    moved = to_device([Batch(x, "name")], torch.device("meta"))[0]
    assert isinstance(moved, Batch) and moved.pixels.is_meta and moved.name == "name"


def test_tensors_of_a_nest_are_its_floating_point_ones() -> None:
    Output = make_dataclass("Output", ["hidden", "name"])
    nest = {"a": [x, (y, torch.ones(2, dtype=torch.int64))], "b": "text", "c": Output(x, "c")}
    found = list(tensors_of(nest))
    assert len(found) == 3 and found[0] is x and found[1] is y and found[2] is x


def test_first_batches() -> None:
    assert len(list(first_batches([x, x, x], 2, CPU))) == 2
    assert len(list(first_batches([x, x, x], None, CPU))) == 3
    assert len(list(first_batches([x], 5, CPU))) == 1


def reads_badly():
    class Data:
        def __iter__(self):
            yield x
            raise OSError("disk on fire")

    return Data()


class Unreadable:
    def __iter__(self):
        raise OSError("no such disk")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no batch"),
        (iter([x]), "only once.*list_iterator"),
        ((b for b in [x]), "only once.*generator"),
        (x, "not a Tensor"),
        ({"first": x}, "not a dict"),
        (7, "not a int"),
        (Unreadable(), "no such disk"),
        (reads_badly(), "batch 1 failed.*disk on fire"),
    ],
)
def test_bad_data_is_named(data, message) -> None:
    with pytest.raises(CalibrationError, match=message):
        list(first_batches(data, None, CPU))


def test_running_puts_every_mode_back_even_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)).train()
    model[1].eval()
    with pytest.raises(ZeroDivisionError), running(model):
        assert not model.training and not model[0].training
        raise ZeroDivisionError
    assert model.training and model[0].training and not model[1].training


def test_running_in_training_mode() -> None:
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)).eval()
    model[0].train()
    with running(model, train=True):
        assert all(module.training for module in model.modules())
    assert not model.training and model[0].training and not model[1].training


def test_errors_of_the_model_name_the_batch() -> None:
    with pytest.raises(ModelError, match=r"batch 4 \(3x2\): RuntimeError"):
        run_or_explain(run, nn.Linear(5, 5), x, 4)


def test_device_of() -> None:
    assert device_of(nn.Linear(2, 2, device="meta")).type == "meta"
    assert device_of(nn.ReLU()) == CPU


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_number_that_is_not_finite_is_found(dtype, bad) -> None:
    tensor = torch.linspace(-1, 1, 12, dtype=dtype).reshape(3, 4)
    nested = {"ids": torch.tensor([1, 2]), "values": [torch.empty(0), (tensor,)]}
    assert all_finite(nested)
    tensor[1, 2] = bad
    assert not all_finite(nested)


class Once:
    """Batches that can be read from the start alone."""

    def __init__(self, batches: list[int]) -> None:
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def test_of_a_sequence_batches_come_from_all_over_it() -> None:
    ordered, kept, count = held_out_first(list(range(80)), 8, 2)
    assert (kept, count) == (2, 8)
    assert ordered == [16, 56, 0, 8, 24, 32, 40, 48, 64, 72]


def test_of_other_data_batches_are_the_first() -> None:
    data = Once(list(range(80)))
    assert held_out_first(data, 8, 2) == (data, 2, 8)
    few = Once(list(range(5)))
    assert held_out_first(few, 8, 2) == (few, 1, 4)


@given(st.integers(2, 60), st.integers(1, 20), st.integers(1, 6))
def test_of_few_batches_none_is_taken_twice_and_a_fifth_is_held_out(there, batches, held) -> None:
    ordered, kept, count = held_out_first(list(range(there)), batches, held)
    looked = min(there, batches + held)
    assert 1 <= kept <= max(1, looked // 5) and kept <= held
    assert count == min(batches, looked - kept)
    assert len(set(ordered)) == len(ordered) == kept + count
    assert list(ordered[:kept]) == sorted(ordered[:kept])
    assert list(ordered[kept:]) == sorted(ordered[kept:])


def test_a_single_batch_is_not_held_out() -> None:
    assert held_out_first([1], 8, 2) == ([1], 0, 1)
    with pytest.raises(CalibrationError, match="only once"):
        held_out_first(iter([1, 2]), 8, 2)


def test_what_is_compiled_runs_as_it_is_written() -> None:
    seen = []

    def backend(graph, example):
        seen.append(graph)
        return graph

    compiled = torch.compile(nn.Linear(3, 2), backend=backend)
    given = torch.randn(4, 3)
    with uncompiled():
        expected = compiled(given)
    assert not seen
    assert torch.equal(compiled(given), expected) and seen
