import pytest
import torch
from torch import nn

from rankfold.cost import count_layer_macs, count_macs, count_parameters


def test_shared_parameters_count_once() -> None:
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    assert count_parameters(nn.Sequential(first, second, first)) == 16


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Linear(7, 5), (3, 7), 3 * 35),
        (nn.Linear(7, 5, bias=False), (2, 3, 7), 6 * 35),
        (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 5), 2 * 25 * 9 * 24),
        (nn.Conv2d(4, 6, (3, 1), stride=(2, 1)), (1, 4, 7, 5), 3 * 5 * 3 * 24),
        (nn.Conv2d(4, 4, 3, padding=1, groups=4), (1, 4, 5, 5), 25 * 9 * 4),
        (nn.Conv1d(4, 6, 3, dilation=2), (1, 4, 9), 5 * 3 * 24),
        (nn.LSTM(6, 8), (5, 3, 6), 15 * 32 * 14),
        (nn.LSTM(6, 8, bias=False), (5, 6), 5 * 32 * 14),
        (nn.LSTM(6, 8, num_layers=2), (5, 3, 6), 15 * 32 * (14 + 16)),
        (nn.LSTM(6, 8, proj_size=4), (5, 3, 6), 15 * (32 * 10 + 8 * 4)),
        (nn.LSTM(6, 8, num_layers=2, bidirectional=True), (5, 3, 6), 15 * 64 * (14 + 24)),
        (nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 5), 2 * 5 * 3 * 24),
        (nn.GRU(6, 8), (5, 3, 6), 15 * 24 * 14),
    ],
    ids=str,
)
def test_macs_are_those_of_the_closed_formulas(layer, shape, macs) -> None:
    assert count_macs(lambda: layer(torch.randn(shape))) == macs
    assert count_layer_macs(layer.to("meta"), [shape]) == macs


def test_attention_is_counted_on_its_fast_path_too() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    batch, length = 3, 5
    linear = batch * length * (16 * 48 + 16 * 16 + 2 * 16 * 32)
    attention = 2 * batch * length * length * 16
    assert count_macs(lambda: layer(torch.randn(batch, length, 16))) == linear + attention
    assert torch.backends.mha.get_fastpath_enabled()


def test_calls_add_up() -> None:
    layer = nn.Linear(4, 4, device="meta")
    assert count_layer_macs(layer, [(1, 4), (2, 3, 4)]) == 7 * 16
    assert count_layer_macs(layer, []) == 0


def test_a_packed_sequence_is_counted_without_its_padding() -> None:
    layer = nn.LSTM(6, 8)
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(5, 3, 6), [5, 3, 2])
    assert count_macs(lambda: layer(packed)) == (5 + 3 + 2) * 32 * 14


@pytest.mark.parametrize(
    ("call", "macs"),
    [
        (lambda: torch.mv(torch.ones(5, 7), torch.ones(7)), 5 * 7),
        # Every output: the outer product of both inputs with a matrix.
        (lambda: nn.Bilinear(3, 4, 5)(torch.ones(2, 3), torch.ones(2, 4)), 2 * 3 * 4 * 5),
    ],
    ids=["matrix by vector", "bilinear"],
)
def test_products_that_torch_does_not_count_are_counted(call, macs) -> None:
    assert count_macs(call) == macs


def test_an_error_of_the_call_leaves_the_fast_path_on() -> None:
    with pytest.raises(RuntimeError):
        count_macs(lambda: nn.Linear(7, 5)(torch.ones(3)))
    assert torch.backends.mha.get_fastpath_enabled()
