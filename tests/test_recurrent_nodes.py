import pytest
import torch
from torch import nn

from rankfold.batches import run
from rankfold.export import export
from rankfold.recurrent_nodes import with_recurrent_nodes
from rankfold.runtime import OnnxNetwork, call_of

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
SHAPES = [
    {},
    {"bidirectional": True, "batch_first": True},
    {"num_layers": 2, "bias": False},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
]


class Reader(nn.Module):
    """A layer that is given initial states or not, and all that it returns."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, steps, states=None):
        return self.layer(steps, states)


def batch_of(layer: nn.Module, samples: int, length: int, with_states: bool) -> dict:
    shape = (samples, length, 3) if layer.batch_first else (length, samples, 3)
    batch = {"steps": torch.randn(shape)}
    if with_states:
        blocks = layer.num_layers * (1 + layer.bidirectional)
        states = tuple(torch.randn(blocks, samples, layer.hidden_size) for _ in range(2))
        batch["states"] = states if isinstance(layer, nn.LSTM) else states[0]
    return batch


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_layer_is_one_node_and_takes_other_lengths(kind, shape, tmp_path) -> None:
    torch.manual_seed(0)
    reader, with_states = Reader(kind(3, 5, **shape)).eval(), "num_layers" in shape
    path, batch = tmp_path / "reader.onnx", batch_of(reader.layer, 2, 4, with_states)
    assert export(reader, path, batch, dynamic="all").output_error < 1e-6
    nodes = [node.op_type for node in onnx.load(path).graph.node]
    assert nodes.count(kind.__name__) == reader.layer.num_layers
    file = OnnxNetwork(path, call_of(reader, batch, run).structure)
    for samples, length in [(2, 4), (3, 4), (2, 9)]:
        other = batch_of(reader.layer, samples, length, with_states)
        with torch.no_grad():
            torch.testing.assert_close(run(file, other), run(reader, other), rtol=1e-5, atol=1e-6)


def test_rectified_units_and_sequences_without_a_batch(tmp_path) -> None:
    torch.manual_seed(0)
    layer = nn.RNN(3, 5, nonlinearity="relu", bidirectional=True).eval()
    steps = {"steps": torch.randn(6, 3), "states": torch.randn(2, 5)}
    assert export(Reader(layer), tmp_path / "one.onnx", steps, dynamic=None).output_error < 1e-6


@pytest.mark.parametrize("with_states", [False, True])
def test_projected_states_which_onnx_has_no_node_for(with_states, tmp_path) -> None:
    torch.manual_seed(0)
    layer = nn.LSTM(3, 5, num_layers=2, bidirectional=True, proj_size=2).eval()
    batch = {"steps": torch.randn(4, 2, 3)}
    if with_states:
        batch["states"] = (torch.randn(4, 2, 2), torch.randn(4, 2, 5))
    assert export(Reader(layer), tmp_path / "projected.onnx", batch).output_error < 1e-6


def test_layers_are_themselves_again() -> None:
    layer = nn.LSTM(3, 5).eval()
    before, steps = layer.state_dict().keys(), torch.randn(4, 2, 3)
    packed = nn.utils.rnn.pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])
    expected = layer(steps)[0], layer(packed)[0].data
    with pytest.raises(ZeroDivisionError), with_recurrent_nodes(layer):
        assert layer(steps)[0].shape == expected[0].shape
        assert torch.equal(layer(packed)[0].data, expected[1])
        raise ZeroDivisionError
    assert layer.state_dict().keys() == before
    assert torch.equal(layer(steps)[0], expected[0])
