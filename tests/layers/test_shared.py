"""One layer for slices of the channels."""

import pytest
import torch
from tensors import tensor_of
from torch import nn

from rankfold.layers.shared import SharedLayer

LAYERS = [
    (nn.Linear(3, 5), ()),
    (nn.Conv1d(3, 5, 2, stride=2), (6,)),
    (nn.Conv2d(3, 5, (3, 2), padding=1, padding_mode="reflect"), (6, 5)),
    (nn.Conv3d(3, 5, 2, dilation=2, padding="same"), (4, 5, 6)),
]


@pytest.mark.parametrize(("layer", "lengths"), LAYERS, ids=str)
@pytest.mark.parametrize("leading", [(), (2,)])
def test_each_slice_goes_through_the_layer_by_itself(layer, lengths, leading) -> None:
    layer = layer.double()
    given = tensor_of((*leading, 4 * 3, *lengths))
    mode = 1 - layer.weight.dim()
    expected = torch.cat([layer(one) for one in given.chunk(4, mode)], mode)
    torch.testing.assert_close(SharedLayer(layer, 4)(given), expected, rtol=1e-12, atol=1e-12)


def test_a_linear_layer_takes_any_leading_modes() -> None:
    layer = nn.Linear(3, 5).double()
    given = tensor_of((2, 7, 6, 4 * 3))
    expected = torch.cat([layer(one) for one in given.chunk(4, -1)], -1)
    torch.testing.assert_close(SharedLayer(layer, 4)(given), expected, rtol=1e-12, atol=1e-12)


def test_channels_last_and_empty_batches_are_taken() -> None:
    shared = SharedLayer(nn.Conv2d(3, 5, 3), 4)
    given = torch.randn(2, 12, 6, 6)
    last = given.to(memory_format=torch.channels_last)
    torch.testing.assert_close(shared(last), shared(given))
    assert shared(given[:0]).shape == (0, 20, 4, 4)
