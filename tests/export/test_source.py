import subprocess
import sys

import pytest
import torch
from networks import make_data, make_model
from safetensors.torch import load_file
from torch import nn

import rankfold
from rankfold.errors import CheckpointError, ModelError
from rankfold.export import write_source

RUN = """
import sys
import torch
from torch import nn
sys.modules["rankfold"] = None
from networks import make_data, make_model
from architecture import load
network = load(make_model())
assert all(type(module).__module__.partition(".")[0] != "rankfold" for module in network.modules())
with torch.no_grad():
    torch.save(network(make_data()[0]), "outputs.pt")
"""


def test_the_file_builds_the_network_without_rankfold(tmp_path) -> None:
    model, data = make_model(), make_data()
    plan = rankfold.analyze(model, data, metric="weight").plan(macs=0.5)
    small = rankfold.merge_adjacent(rankfold.factorize(model, plan), data[0])
    path = write_source(small, make_model, tmp_path)
    assert path == tmp_path / "architecture.py"
    text = path.read_text()
    assert "import rankfold" not in text and "nn.Sequential(" in text
    # In another process, which cannot import rankfold at all.
    where = [str(tmp_path), *sys.path]
    code = f"import sys; sys.path[:] = {where!r}\n{RUN}"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    found = torch.load(tmp_path / "outputs.pt", weights_only=True)
    with torch.no_grad():
        torch.testing.assert_close(found, small(data[0]), rtol=0, atol=0)


def test_paddings_that_are_words(tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(24, 24, 3, padding="same", padding_mode="circular")).eval()
    batch = torch.randn(2, 24, 6, 6)
    plan = rankfold.analyze(model, [batch], metric="weight").plan(macs=0.5)
    small = rankfold.factorize(model, plan)
    text = write_source(small, model, tmp_path).read_text()
    assert 'padding="same"' in text and 'padding_mode="circular"' in text
    namespace: dict = {"__file__": str(tmp_path / "architecture.py"), "__name__": "made"}
    exec(text, namespace)
    with torch.no_grad():
        torch.testing.assert_close(namespace["load"](model)(batch), small(batch), rtol=0, atol=0)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(24, 16)
        self.rest = nn.ModuleDict({"out": nn.Linear(16, 24, bias=False)})
        self.rest["out"].weight = self.table.weight

    def forward(self, places):
        return self.rest["out"](self.table(places))


def test_shared_factors_stay_shared_and_keep_their_dtype(tmp_path) -> None:
    torch.manual_seed(0)
    model, places = Tied().half().eval(), torch.randint(24, (2, 5))
    plan = rankfold.analyze(model, [places], metric="weight").plan(fraction=0.25)
    small = rankfold.factorize(model, plan)
    write_source(small, model, tmp_path)
    namespace: dict = {"__file__": str(tmp_path / "architecture.py"), "__name__": "made"}
    exec((tmp_path / "architecture.py").read_text(), namespace)
    again = namespace["load"](Tied().half())
    assert {name: p.dtype for name, p in again.named_parameters()} == {
        name: p.dtype for name, p in small.named_parameters()
    }
    assert len(list(again.parameters())) == len(list(small.parameters()))
    with torch.no_grad():
        torch.testing.assert_close(again(places), small(places), rtol=0, atol=0)


def test_layers_that_torch_does_not_have_are_named(tmp_path) -> None:
    model, batch = nn.Sequential(nn.Linear(64, 64)).eval(), torch.randn(4, 64)
    analysis = rankfold.analyze(model, [batch], methods=["toeplitz-like"], metric="weight")
    plan = analysis.plan(params=0.7)
    small = rankfold.factorize(model, plan)
    with pytest.raises(ModelError, match=r"layer '0' is a ToeplitzLike\w*, which torch does not"):
        write_source(small, model, tmp_path)


def test_what_cannot_be_rebuilt_or_written_is_said(tmp_path) -> None:
    model = make_model()
    small = rankfold.factorize(
        model, rankfold.analyze(model, make_data(), metric="weight").plan(macs=0.5)
    )
    small.register_buffer("more", torch.zeros(2))
    with pytest.raises(ModelError, match="'more' cannot be rebuilt"):
        write_source(small, make_model, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_source(model, make_model, tmp_path / "file" / "inside")
    write_source(model, make_model, tmp_path / "dense")  # nothing changed is a change too
    assert load_file(tmp_path / "dense" / "model.safetensors").keys() == model.state_dict().keys()
