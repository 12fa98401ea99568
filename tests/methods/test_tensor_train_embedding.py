import dataclasses
import json
from itertools import pairwise

import pytest
import torch
from torch import nn

import rankfold
from rankfold.cost import count_layer_macs, count_parameters
from rankfold.errors import RankError
from rankfold.layers import TensorTrainEmbedding
from rankfold.methods import METHODS, WEIGHT_METRIC, EmbeddingTrain, Moments


@pytest.mark.parametrize(("count", "width"), [(30, 16), (37, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_lost_at_full_rank(count: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Embedding(count, width, padding_idx=2, dtype=dtype).eval()
    family = EmbeddingTrain().fit(layer, WEIGHT_METRIC)
    form = family.build(family.ranks()[-1])
    assert repr(form.to_dense()) == repr(layer) and not form.training
    torch.testing.assert_close(form.to_dense().weight, layer.weight, rtol=1e-4, atol=1e-5)
    assert family.loss(family.ranks()[-1]) < 1e-9


def test_a_table_that_is_a_train_is_found() -> None:
    torch.manual_seed(0)
    given = TensorTrainEmbedding(64, 24, 4, dtype=torch.float64)
    layer = given.to_dense()
    found = EmbeddingTrain(alignment=1).fit(layer, WEIGHT_METRIC).build((4,))
    torch.testing.assert_close(found.to_dense().weight, layer.weight)


def test_losses_are_those_of_the_metric() -> None:
    torch.manual_seed(0)
    layer = nn.Embedding(40, 24)
    root = torch.randn(24, 24, dtype=torch.float64)
    moments = Moments(torch.rand(40, dtype=torch.float64) + 0.1, root @ root.mT, 2.0)
    family = EmbeddingTrain(alignment=4).fit(layer, moments)
    ranks = family.ranks()
    losses = [family.loss(rank) for rank in ranks]
    assert all(more <= less + 1e-12 for less, more in pairwise(losses))
    first = (family.build(ranks[0]).to_dense().weight - layer.weight).detach().double()
    expected = 2.0 * (moments.inputs[:, None] * first * (first @ moments.gradients)).sum()
    assert losses[0] == pytest.approx(expected.item(), rel=1e-5)


def test_cost_by_hand_and_bounds() -> None:
    layer, method = nn.Embedding(60, 24), EmbeddingTrain()
    form = method.skeleton(layer, (5,))
    assert (form.row_modes, form.column_modes) == ((4, 4, 4), (2, 3, 4))
    assert count_parameters(form) == 4 * 2 * 5 + 5 * 4 * 3 * 5 + 5 * 4 * 4
    # One row of the first core, then two products for each of 7 tokens.
    assert count_layer_macs(form, [(7, 1)]) == 7 * (2 * 5 * 15 + 6 * 5 * 4)
    family = method.fit(layer, WEIGHT_METRIC)
    most = max(form.limits)
    for rank in ((0,), (most + 1,), (1, 1)):
        for call in (family.build, family.loss, lambda r: method.skeleton(layer, r)):
            with pytest.raises(RankError):
                call(rank)
    assert "Linear" in method.why_not(nn.Linear(3, 3))
    assert "sparse" in method.why_not(nn.Embedding(3, 3, sparse=True))
    settings = json.loads(json.dumps(dataclasses.asdict(EmbeddingTrain(4, 2))))
    assert METHODS[method.name](**settings) == EmbeddingTrain(4, 2)
    with pytest.raises(ValueError, match="modes"):
        EmbeddingTrain(modes=1)


def test_in_a_network(tmp_path) -> None:
    torch.manual_seed(0)

    def make() -> nn.Module:
        return nn.Sequential(nn.Embedding(200, 32), nn.Flatten(), nn.Linear(6 * 32, 8)).eval()

    model, data = make(), [torch.randint(200, (4, 6)) for _ in range(6)]
    analysis = rankfold.analyze(
        model, data, methods="tensor-train-embedding", metric="fisher", check=False
    )
    small = rankfold.factorize(model, analysis.plan(params=0.7))
    assert isinstance(small[0], TensorTrainEmbedding)
    rankfold.recover(small, data, teacher=model, epochs=1)
    rankfold.save(small, tmp_path / "small")
    loaded = rankfold.load(tmp_path / "small", make)
    assert torch.equal(loaded(data[0]), small.eval()(data[0]))
