import importlib
import importlib.util
from dataclasses import replace

import pytest
import torch
from networks import make_data, make_labelled, make_model
from torch import nn

import rankfold
from rankfold.errors import CheckpointError, DeviceError, ModelError, RankfoldError
from rankfold.export import FORMATS, export
from rankfold.export import export as export_function
from rankfold.measure import memory_format_of, with_memory_format

SUFFIX = {name: kind.suffix for name, kind in FORMATS.items()}
INSTALLED = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            any(importlib.util.find_spec(package) is None for package in kind.packages),
            reason=f"needs {kind.packages}",
        ),
    )
    for name, kind in FORMATS.items()
]


@pytest.fixture(scope="module")
def small() -> nn.Module:
    model = make_model()
    plan = rankfold.analyze(model, make_data(), metric="weight").plan(macs=0.5)
    return rankfold.factorize(model, plan)


@pytest.mark.parametrize("kind", INSTALLED)
def test_the_file_is_run_and_compared(kind, small, tmp_path) -> None:
    path = tmp_path / f"small{SUFFIX[kind]}"
    before = {name: value.clone() for name, value in small.state_dict().items()}
    done = export(
        small,
        path,
        make_data()[0],
        data=make_labelled(),
        metric=rankfold.accuracy,
    )
    assert done.path == path and path.is_file()
    assert done.output_error < 1e-5
    assert done.dynamic == ("batch",)
    assert done.metric is not None and done.metric[0] == done.metric[1]
    assert done.before_ms > 0 and done.after_ms > 0 and done.file_bytes >= path.stat().st_size
    assert all(one.name.startswith("small") for one in tmp_path.iterdir())
    assert {"onnx": "onnxruntime", "torch": "torch"}.get(kind, kind) in done.runtime
    assert "batch" in str(done) and "metric" in str(done)
    assert all(torch.equal(before[name], value) for name, value in small.state_dict().items())


@pytest.mark.parametrize("kind", INSTALLED)
def test_a_channels_last_network_is_written_like_any(kind, small, tmp_path) -> None:
    last = with_memory_format(small, "channels_last")
    assert memory_format_of(last) == "channels_last"
    assert export(last, tmp_path / f"small{SUFFIX[kind]}", make_data()[0]).output_error < 1e-5
    assert memory_format_of(last) == "channels_last"


@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_one_sample_is_example_enough_for_many(kind, small, tmp_path) -> None:
    path = tmp_path / f"small{SUFFIX[kind]}"
    assert export(small, path, make_data()[0][:1]).dynamic == ("batch",)
    assert export(small, path, make_data()[0][:1], dynamic=None, to=kind).dynamic == ()


@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_sizes_may_differ_where_the_model_allows(kind, tmp_path) -> None:
    torch.manual_seed(0)
    free = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    fixed = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    batch, path = torch.randn(4, 3, 8, 8), tmp_path / f"small{SUFFIX[kind]}"
    assert export(free, path, batch, dynamic="all").dynamic == ("batch", "size")
    assert export(fixed, path, batch, dynamic="all").dynamic == ("batch",)


class Reader(nn.Module):
    """Of words: a convolution over the picture, its columns in sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 6, 3, padding=1)
        self.columns = nn.AdaptiveAvgPool2d((None, 1))
        self.lstm = nn.LSTM(6, 5, bidirectional=True, batch_first=True)

    def forward(self, pictures):
        seen = self.convolution(pictures).relu().permute(0, 3, 1, 2)
        return self.lstm(self.columns(seen).squeeze(3))[0]


@pytest.mark.parametrize("kind", [name for name in INSTALLED if name in ("onnx", "openvino")])
def test_readers_take_words_of_any_width(kind, tmp_path) -> None:
    """Though ONNX Runtime does not read a file in which heights are free too."""
    torch.manual_seed(0)
    path, pictures = tmp_path / f"reader{SUFFIX[kind]}", torch.randn(2, 1, 8, 12)
    done = export(Reader(), path, pictures, dynamic="all")
    assert "batch" in done.dynamic and {"size", "last axis"} & set(done.dynamic)


class Loops(nn.Module):
    """As many steps as there are samples: no length but its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, rows, by=None):
        found = torch.zeros(4)
        for row in rows:
            found = self.linear(found + row)
        return {"last": found, "scaled": found * (1 if by is None else by)}


def test_what_no_other_length_is_known_for_is_exported_at_its_own(tmp_path) -> None:
    done = export(Loops(), tmp_path / "loops.onnx", {"rows": torch.randn(3, 4)})
    assert done.dynamic == () and done.output_error < 1e-5


def test_inputs_by_name_and_nested_outputs(tmp_path) -> None:
    batch = {"rows": torch.randn(3, 4), "by": torch.tensor(2.0)}
    assert export(Loops(), tmp_path / "loops.pt2", batch).output_error < 1e-5


def test_recurrent_networks_and_batch_norms(tmp_path) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.norm = nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6)
            self.lstm = nn.LSTM(6, 5, batch_first=True, bidirectional=True)

        def forward(self, given):
            seen = self.norm(self.convolution(given)).relu()
            return self.lstm(seen.mT)[0]

    torch.manual_seed(0)
    model = Reader().train()
    model(torch.randn(4, 3, 12))
    for fold in (True, False):
        done = export(model, tmp_path / "reader.onnx", torch.randn(2, 3, 12), fold=fold)
        assert done.output_error < 1e-5 and "batch" in done.dynamic
    assert model.training and isinstance(model.norm, nn.BatchNorm1d)


def test_what_goes_wrong_is_said(small, tmp_path, monkeypatch) -> None:
    batch = make_data()[0]
    with pytest.raises(RankfoldError, match=r"does not tell the format: end it in \.onnx"):
        export(small, tmp_path / "small.bin", batch)
    with pytest.raises(RankfoldError, match="give data"):
        export(small, tmp_path / "small.onnx", batch, metric=rankfold.accuracy)
    with pytest.raises(CheckpointError, match="cannot be written"):
        export(small, tmp_path / "nowhere" / "small.onnx", batch)

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, given):
            return self.linear(given) if given.sum() > 0 else given

    with pytest.raises(ModelError, match="cannot be exported"):
        export(Branching(), tmp_path / "branching.onnx", torch.ones(2, 4))

    class Unreadable(nn.Module):
        def __init__(self, *_) -> None:
            raise RuntimeError("not mine")

    unreadable = replace(FORMATS["torch"], load=Unreadable)
    with monkeypatch.context() as context, pytest.raises(ModelError, match="cannot be read by"):
        context.setitem(FORMATS, "torch", unreadable)
        export(small, tmp_path / "small.pt2", batch)
    assert not (tmp_path / "small.pt2").exists()
    formats = importlib.import_module("rankfold.export.formats")
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    with pytest.raises(DeviceError, match=r"rankfold\[onnx\]"):
        export(small, tmp_path / "small.onnx", batch)


def test_a_file_that_gives_other_outputs_is_refused(small, tmp_path, monkeypatch) -> None:
    module = importlib.import_module("rankfold.export.export")
    assert module.export is export_function
    monkeypatch.setattr(module, "output_error", lambda expected, found: 0.1)
    with pytest.raises(ModelError, match="gives other outputs than the model"):
        export(small, tmp_path / "small.onnx", make_data()[0])
    assert list(tmp_path.iterdir()) == []  # no file that is wrong
