import math

import pytest
import torch
from torch import nn

from rankfold.cost import (
    count_layer_macs,
    count_macs,
    count_parameters,
    example_input,
    shape_of_call,
)
from rankfold.layers import TiedLayers, TiedTwoFactor


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
        # 5 n log₂ n floating-point operations: half as many multiply-accumulates.
        (lambda: torch.fft.fft(torch.ones(3, 16) + 0j), 3 * 5 * 16 * 4 // 2),
        (lambda: torch.fft.ifft(torch.ones(3, 16) + 0j, dim=0), round(5 * 48 * math.log2(3)) // 2),
        (lambda: torch.fft.fft2(torch.ones(3, 8, 16) + 0j), 3 * 5 * 128 * 7 // 2),
        # Of real numbers the half.
        (lambda: torch.fft.rfft(torch.ones(3, 16)), 3 * 5 * 16 * 4 // 4),
        (lambda: torch.fft.rfft(torch.ones(3, 10), 16), 3 * 5 * 16 * 4 // 4),
        (lambda: torch.fft.irfft(torch.ones(3, 9) + 0j, 16), 3 * 5 * 16 * 4 // 4),
        (lambda: torch.fft.rfft(torch.ones(3, 1)), 0),
        (lambda: torch.fft.fft(torch.ones(3, 16)), 3 * 5 * 16 * 4 // 4),
    ],
    ids=[
        "matrix by vector",
        "bilinear",
        "complex transform",
        "along another mode, back",
        "of two modes",
        "real transform",
        "padded",
        "back to real numbers",
        "of one number",
        "real, to a whole spectrum",
    ],
)
def test_products_that_torch_does_not_count_are_counted(call, macs) -> None:
    assert count_macs(call) == macs


def test_an_error_of_the_call_leaves_the_fast_path_on() -> None:
    with pytest.raises(RuntimeError):
        count_macs(lambda: nn.Linear(7, 5)(torch.ones(3)))
    assert torch.backends.mha.get_fastpath_enabled()


def test_calls_of_lookups_are_known_by_a_last_mode_of_one() -> None:
    embedding, linear = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
    ids, cpu = torch.randint(9, (2, 5)), torch.device("cpu")
    assert shape_of_call(embedding, ids) == (2, 5, 1)
    assert shape_of_call(linear, torch.randn(2, 5, 4)) == (2, 5, 4)
    found = example_input(embedding, (2, 5, 1), torch.float32, cpu)
    assert found.shape == (2, 5) and not found.is_floating_point() and found.max() < 9
    assert example_input(linear, (2, 1), torch.float64, cpu).dtype == torch.float64
    linear.weight = embedding.weight
    tied = TiedLayers([embedding, linear])
    # A row is looked up for nothing, and multiplied by all of them; as factors both cost.
    assert count_layer_macs(tied, [(2, 5, 1), (2, 5, 4)]) == 10 * 36
    form = TiedTwoFactor(tied, 3, "meta")
    assert count_layer_macs(form, [(2, 5, 1), (2, 5, 4)]) == 10 * (12 + 12 + 27)


def test_a_parameter_may_be_the_input_of_a_module() -> None:
    """As learned queries and relative positions are."""

    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries, self.layer = nn.Parameter(torch.randn(3, 4)), nn.Linear(4, 5)

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            return given @ self.layer(self.queries).mT

    model = Queries()
    assert count_macs(lambda: model(torch.randn(2, 5))) == 3 * 4 * 5 + 2 * 5 * 3
