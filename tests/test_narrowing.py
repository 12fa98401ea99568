import copy

import pytest
import torch
from geometry import convolutions, linears, transposed_convolutions
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rankfold.errors import PlanError
from rankfold.narrowing import Kept, Removal, channel_counts, narrow

LAYERS = st.one_of(
    linears(dtype=torch.float64),
    convolutions(dtype=torch.float64, channels=st.integers(1, 4), groups=st.integers(1, 3)),
    transposed_convolutions(
        dtype=torch.float64, channels=st.integers(1, 4), groups=st.integers(1, 3)
    ),
)


def some(draw, count: int, groups: int = 1) -> list[int]:
    """Some of the groups: indices of all that is in them, in order."""
    size = count // groups
    chosen = draw(st.sets(st.integers(0, groups - 1), min_size=1))
    return sorted(group * size + place for group in chosen for place in range(size))


@given(LAYERS, st.data())
def test_a_narrower_layer_does_what_the_wide_one_does_on_zeros(layer_and_shape, data) -> None:
    """On inputs that are 0 but for those kept, the outputs kept are the same."""
    layer, shape = layer_and_shape
    outputs, inputs = channel_counts(layer)
    groups = getattr(layer, "groups", 1)
    if groups > 1:
        whole = some(data.draw, groups)
        kept_outputs, kept_inputs = (
            [g * (count // groups) + place for g in whole for place in range(count // groups)]
            for count in (outputs, inputs)
        )
    else:
        kept_outputs, kept_inputs = (some(data.draw, count, count) for count in (outputs, inputs))
    axis = 1 if not isinstance(layer, nn.Linear) else -1
    batch = torch.randn(shape, dtype=torch.float64)
    mask = torch.zeros(inputs, dtype=torch.float64)
    mask[kept_inputs] = 1
    sizes = [1] * batch.dim()
    sizes[axis] = inputs
    batch = batch * mask.view(sizes)
    kept = Kept("0", tuple(kept_outputs), tuple(kept_inputs))
    model = nn.Sequential(layer)
    small = narrow(copy.deepcopy(model), Removal((kept,)))
    with torch.no_grad():
        expected = model(batch).index_select(axis, torch.tensor(kept_outputs))
        found = small(batch.index_select(axis, torch.tensor(kept_inputs)))
    torch.testing.assert_close(found, expected)
    assert repr(small[0]) == repr(_like(layer, len(kept_outputs), len(kept_inputs)))
    everything = Kept("0", tuple(range(outputs)), tuple(range(inputs)))
    again = narrow(copy.deepcopy(model), Removal((everything,)))
    assert all(map(torch.equal, again.parameters(), model.parameters()))


def _like(layer, outputs: int, inputs: int) -> nn.Module:
    other = copy.deepcopy(layer)
    if isinstance(layer, nn.Linear):
        other.in_features, other.out_features = inputs, outputs
    else:
        if layer.groups > 1:
            other.groups = inputs * layer.groups // layer.in_channels
        other.in_channels, other.out_channels = inputs, outputs
    return other


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm1d(4), nn.InstanceNorm1d(4, affine=True), nn.BatchNorm1d(4, affine=False)],
)
def test_norms_lose_channels(norm) -> None:
    norm.double().train()
    batch = torch.randn(3, 4, 5).double()
    norm(batch)
    model = nn.Sequential(norm.eval())
    small = narrow(copy.deepcopy(model), Removal((Kept("0", (0, 2)),)))
    torch.testing.assert_close(small(batch[:, [0, 2]]), model(batch)[:, [0, 2]])
    assert small[0].num_features == 2


def test_slopes_are_lost_with_their_channels() -> None:
    model = nn.Sequential(nn.PReLU(3))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(3.0))
    small = narrow(copy.deepcopy(model), Removal((Kept("0", (1, 2)),)))
    assert small[0].weight.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("layer", "kept", "reason"),
    [
        (nn.Linear(4, 3), {"outputs": (0, 3)}, "3 channels"),
        (nn.Linear(4, 3), {"inputs": (1, 1)}, "cannot be kept"),
        (nn.Linear(4, 3), {"inputs": (2, 1)}, "cannot be kept"),
        (nn.Linear(4, 3), {"inputs": ()}, "cannot be kept"),
        (nn.Linear(4, 3), {"outputs": tuple(range(10**5))}, "cannot be kept"),
        (nn.Linear(4, 3), {"trimmed": (1,)}, "cannot be trimmed"),
        (nn.Conv2d(4, 4, 3, padding=1), {"trimmed": (1,)}, "cannot be trimmed"),
        (nn.Conv2d(4, 4, 3, padding=1), {"trimmed": (2, 1)}, "cannot lose"),
        (nn.Conv2d(4, 4, 3), {"trimmed": (1, 1)}, "cannot lose"),
        (nn.Conv2d(4, 4, 3, padding=1, dilation=2), {"trimmed": (1, 1)}, "cannot lose"),
        (nn.Conv2d(4, 4, 3, groups=2), {"outputs": (0, 1)}, "both sides"),
        (nn.Conv2d(4, 4, 3, groups=2), {"outputs": (0, 1), "inputs": (2, 3)}, "both sides"),
        (nn.Conv2d(4, 4, 3, groups=2), {"outputs": (0,), "inputs": (0,)}, "whole groups"),
        (nn.BatchNorm1d(4), {"inputs": (0,)}, "neither inputs"),
        (nn.PReLU(4), {"hollow": True}, "hollow"),
        (nn.PReLU(), {"outputs": (0, 1)}, "1 channels"),
        (nn.LayerNorm(4), {"outputs": (0,)}, "cannot be taken out of"),
        (nn.LSTM(4, 4), {"outputs": (0,)}, "cannot be taken out of"),
    ],
)
def test_what_is_no_part_of_a_module_is_refused_and_nothing_changed(layer, kept, reason) -> None:
    model = nn.Sequential(nn.Linear(4, 4), layer)
    before = repr(model)
    with pytest.raises(PlanError, match=reason):
        narrow(model, Removal((Kept("0", outputs=(0,)), Kept("1", **kept))))
    assert repr(model) == before


@pytest.mark.parametrize(
    "document",
    [
        None,
        [],
        {},
        {"kept": [], "merged_before": True},
        {"kept": {}, "merged_before": 0},
        {"kept": [{}], "merged_before": 0},
        {"kept": [Kept(3).to_json()], "merged_before": 0},
        {"kept": [Kept("0", hollow=1).to_json()], "merged_before": 0},
        {"kept": [Kept("0", outputs=(-1,)).to_json()], "merged_before": 0},
        {"kept": [Kept("0", inputs="all").to_json()], "merged_before": 0},
        {"kept": [Kept("0", trimmed=(1.0,)).to_json()], "merged_before": 0},
        {"kept": [], "merged_before": 0, "more": 1},
    ],
)
def test_what_is_no_removal_is_refused(document) -> None:
    with pytest.raises(PlanError, match="removal"):
        Removal.from_json(document)


def test_a_removal_survives_json() -> None:
    removal = Removal((Kept("a", (0, 2), None, (1, 0), True), Kept("b")), 3)
    assert Removal.from_json(removal.to_json()) == removal
