import pytest
import torch
from networks import make_data, make_model
from torch import nn

from rankfold import runtime
from rankfold.batches import run
from rankfold.errors import DeviceError, ModelError
from rankfold.runtime import RUNTIMES, caller, check_runtime, prepare, version_of


def is_installed(name: str) -> bool:
    try:
        check_runtime(name)
    except DeviceError:
        return False
    return True


INSTALLED = [name for name in RUNTIMES if is_installed(name)]


def device_of(name: str) -> torch.device:
    """That a runtime is for."""
    return torch.device("cuda" if name == "cuda-graph" else "cpu")


class Nested(nn.Module):
    """Outputs in a mapping, one of them in a tuple; takes arguments by name."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x, scale):
        found = self.linear(x) * scale
        return {"found": found, "more": (found.sum(1), x)}


@pytest.mark.parametrize("name", INSTALLED)
def test_outputs_are_the_models_own(name) -> None:
    device = device_of(name)
    model, batch = make_model().train().to(device), make_data()[0].to(device)
    ready = prepare(model, batch, run, name)
    assert model.training
    with torch.no_grad():
        expected = run(model.eval(), batch)
        for found in (run(ready, batch), caller(model, batch, run, name)()):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", INSTALLED)
def test_nested_outputs_and_named_inputs(name) -> None:
    device = device_of(name)
    model = Nested().eval().to(device)
    batch = {"x": torch.randn(3, 6, device=device), "scale": torch.tensor(2.0, device=device)}
    with torch.no_grad():
        found = run(prepare(model, batch, run, name), batch)
        torch.testing.assert_close(found, model(**batch))


@pytest.mark.parametrize("name", INSTALLED)
def test_recurrent_layers_with_their_tuples(name) -> None:
    device = device_of(name)
    model = nn.LSTM(5, 7, bidirectional=True).eval().to(device)
    batch = torch.randn(4, 2, 5, device=device)
    with torch.no_grad():
        torch.testing.assert_close(prepare(model, batch, run, name)(batch), model(batch))


def test_eager_is_the_model_itself() -> None:
    model = make_model()
    assert prepare(model, make_data()[0], run, "eager") is model


def test_many_modules_of_one_kind_are_all_compiled() -> None:
    """Torch stops compiling a forward after eight variants, and only logs it."""
    from torch._dynamo.utils import counters

    for width in range(1, 11):
        model = nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2)).eval()
        before = counters["stats"]["unique_graphs"]
        with torch.no_grad():
            prepare(model, torch.randn(2, 3), run, "compile")
        assert counters["stats"]["unique_graphs"] == before + 1


def test_unknown_and_missing_runtimes_are_refused(monkeypatch) -> None:
    with pytest.raises(DeviceError, match="there are eager, compile, cuda-graph, onnxruntime"):
        check_runtime("tensorrt")
    monkeypatch.setattr(runtime, "find_spec", lambda name: None)
    with pytest.raises(DeviceError, match=r"pip install 'rankfold\[onnx\]'"):
        check_runtime("onnxruntime")
    check_runtime("compile")


def test_what_cannot_be_exported_is_said_in_one_line() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            return self.linear(x) if x.sum() > 0 else x

    with pytest.raises(ModelError, match="cannot be run by onnxruntime") as caught:
        prepare(Branching(), torch.randn(2, 3), run, "onnxruntime")
    assert "\n" not in str(caught.value)


def test_a_model_called_twice_for_a_batch_cannot_be_exported() -> None:
    def twice(model, batch):
        return model(batch) + model(batch)

    with pytest.raises(ModelError, match="2 times"):
        prepare(nn.Linear(3, 3), torch.randn(2, 3), twice, "onnxruntime")


@pytest.mark.parametrize("name", INSTALLED)
def test_versions_tell_runtimes_apart(name) -> None:
    assert len({version_of(one) for one in INSTALLED}) == len(INSTALLED) >= 3
    assert any(character.isdigit() for character in version_of(name))


def test_a_graph_is_refused_where_there_is_no_cuda_device(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="torch sees none"):
        check_runtime("cuda-graph")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(DeviceError, match="for models on a CUDA device"):
        prepare(make_model(), make_data()[0], run, "cuda-graph")


@pytest.mark.skipif("cuda-graph" not in INSTALLED, reason="needs a CUDA device")
def test_a_graph_takes_new_inputs_of_the_same_shapes_alone() -> None:
    model, batches = make_model().cuda(), [batch.cuda() for batch in make_data()]
    with torch.no_grad():
        ready = prepare(model, batches[0], run, "cuda-graph")
        for batch in batches[1:3]:
            torch.testing.assert_close(ready(batch), model(batch), rtol=1e-3, atol=1e-4)
        with pytest.raises(ModelError, match="shape"):
            ready(batches[0][:1])
        with pytest.raises(ModelError, match="arguments"):
            ready(images=batches[0])
