import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rankfold.errors import RankError
from rankfold.layers import TensorTrainEmbedding, table_modes


@given(st.integers(1, 40), st.integers(1, 24), st.integers(1, 3), st.booleans(), st.data())
@settings(max_examples=80, deadline=None)
def test_it_looks_up_the_table(count: int, width: int, modes: int, padded: bool, data) -> None:
    rows, columns = table_modes(count, width, modes, modes)
    most = max(TensorTrainEmbedding(count, width, 1, modes, modes, device="meta").limits, default=1)
    rank = data.draw(st.integers(1, most))
    padding = data.draw(st.integers(0, count - 1)) if padded else None
    layer = TensorTrainEmbedding(count, width, rank, modes, modes, padding, dtype=torch.float64)
    assert len(layer.cores) == modes and math.prod(rows) >= count
    ids = torch.randint(count, data.draw(st.sampled_from([(), (5,), (2, 3)])))
    dense = layer.to_dense()
    assert repr(dense) == repr(nn.Embedding(count, width, padding))
    torch.testing.assert_close(layer(ids), dense(ids))
    # Entry by entry as in the paper.
    token, column = data.draw(st.integers(0, count - 1)), data.draw(st.integers(0, width - 1))
    places = zip(
        torch.unravel_index(torch.tensor(token), rows),
        torch.unravel_index(torch.tensor(column), columns),
        layer.cores,
        strict=True,
    )
    product = torch.ones(1, 1, dtype=torch.float64)
    for row, col, core in places:
        product = product @ core[:, row, col]
    expected = 0.0 if token == padding else product.item()
    assert dense.weight[token, column].item() == pytest.approx(expected)


def test_it_is_trained_from_scratch() -> None:
    torch.manual_seed(0)
    layer = TensorTrainEmbedding(1000, 64, 16, padding_idx=0)
    table = layer.to_weight().detach()
    assert table[1:].std() == pytest.approx(1, rel=0.25)
    assert sum(p.numel() for p in layer.parameters()) < 0.2 * 1000 * 64
    target, ids = torch.randn(20, 64), torch.arange(0, 200, 10)
    optimizer = torch.optim.Adam(layer.parameters(), 0.02)
    losses = []
    for _ in range(100):
        loss = (layer(ids) - target)[1:].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert not layer(torch.tensor([0])).any()


def test_what_makes_no_table_is_refused() -> None:
    for settings_, message in (
        ({"rank": 0}, "rank 0"),
        ({"rank": 10**6}, "rank"),
        ({"rank": 1, "row_modes": (5, 4)}, "pairs"),
        ({"rank": 1, "row_modes": (2, 2, 2)}, "number 20 tokens"),
        ({"rank": 1, "column_modes": (5, 5, 5)}, "multiply"),
    ):
        with pytest.raises(RankError, match=message):
            TensorTrainEmbedding(20, 12, **settings_)
    with pytest.raises(IndexError, match="padding"):
        TensorTrainEmbedding(20, 12, 2, padding_idx=20)
