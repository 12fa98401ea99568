import pytest
import torch
from geometry import layers
from hypothesis import given
from torch import nn

from rankfold.layers import HollowLayer


@given(layers())
def test_shape_and_dtype_are_those_of_the_layer(layer_and_shape) -> None:
    layer, shape = layer_and_shape
    hollow = HollowLayer(layer)
    batch = torch.randn(shape)
    with torch.no_grad():
        expected = torch.zeros_like(layer(batch))
    assert torch.equal(hollow(batch), expected)
    assert hollow(batch.double()).dtype == torch.float64
    assert not list(hollow.parameters())
    assert hollow(torch.empty(shape, device="meta")).is_meta


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3, 2, 1), nn.ConvTranspose2d(3, 4, 3, 2, 1)])
def test_unbatched_inputs_and_those_of_other_widths(layer) -> None:
    batch = torch.randn(3, 7, 8)
    with torch.no_grad():
        assert HollowLayer(layer)(batch).shape == layer(batch).shape
    assert HollowLayer(layer)(batch[:1]).shape == layer(batch).shape


def test_it_can_be_exported() -> None:
    model = nn.Sequential(HollowLayer(nn.Conv2d(3, 4, 3, 2, 1)), nn.ReLU(inplace=True))
    exported = torch.export.export(model, (torch.randn(1, 3, 7, 8),)).module()
    assert exported(torch.randn(1, 3, 7, 8)).shape == (1, 4, 4, 4)
