import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankfold.layers import ChannelSelection


@pytest.mark.parametrize("batched", [True, False])
@given(dimension=st.integers(1, 3), channels=st.integers(1, 9), last=st.booleans())
def test_channels_are_selected_in_any_memory_format(batched, dimension, channels, last) -> None:
    tensor = torch.randn(2, channels, *(3, 4, 2)[:dimension])
    if last:
        tensor = tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    if not batched:
        tensor = tensor[0]
    chosen = torch.randint(channels, (5,))
    mode = -1 - dimension
    selected = ChannelSelection(chosen, mode)(tensor)
    assert torch.equal(selected, tensor.index_select(mode, chosen))
    if last and channels > 1:
        assert selected.movedim(mode, -1).is_contiguous()


def test_features_of_a_linear_layer_are_selected() -> None:
    tensor = torch.randn(3, 2, 6)
    chosen = torch.tensor([4, 0, 4])
    assert torch.equal(ChannelSelection(chosen, -1)(tensor), tensor[..., chosen])
