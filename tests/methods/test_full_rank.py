import pytest
import torch
from geometry import relative
from tensors import tensor_of, weight_of
from torch import nn

import rankfold
from rankfold.methods import WEIGHT_METRIC, FullRank, Moments, reduction


def of_rank(layer: nn.Module, rank: int, seed: int = 0) -> nn.Module:
    rows, columns = layer.weight.flatten(1).shape
    weight = tensor_of((rows, rank), seed=seed) @ tensor_of((rank, columns), seed=seed + 1)
    with torch.no_grad():
        layer.weight.copy_(weight.reshape(layer.weight.shape))
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layer", [nn.Linear(60, 40), nn.Conv2d(12, 40, 3)], ids=str)
def test_the_rank_is_the_numerical_one(layer, dtype) -> None:
    layer = of_rank(layer.double(), 13)
    if dtype == torch.bfloat16:  # the rounding of the weights themselves is noise of full rank
        assert FullRank().fit(layer.to(dtype), WEIGHT_METRIC).ranks() == [(40,)]
        return
    layer = layer.to(dtype)
    family = FullRank(alignment=1).fit(layer, WEIGHT_METRIC)
    assert family.ranks() == [(13,)]
    assert family.loss((13,)) < 1e-10
    assert relative(family.build((13,)).to_dense().weight, layer.weight) < 1e-5
    assert FullRank().fit(layer, WEIGHT_METRIC).ranks() == [(16,)]


def test_nothing_is_gained_of_full_rank_and_of_zero_one_rank_is_left() -> None:
    layer = nn.Linear(20, 12)
    assert FullRank().fit(layer, WEIGHT_METRIC).ranks() == [(12,)]
    nn.init.zeros_(layer.weight)
    family = FullRank(alignment=1).fit(layer, WEIGHT_METRIC)
    assert family.ranks() == [(1,)] and family.loss((1,)) == 0


@pytest.mark.parametrize("damping", [0, 1e-6])
def test_in_a_metric_what_no_input_shows_does_not_count(damping) -> None:
    layer = nn.Linear(40, 32, dtype=torch.float64)
    inputs = weight_of(40, seed=1, rank=6)
    inputs += damping * inputs.diagonal().mean() * torch.eye(40)
    family = FullRank(alignment=1).fit(layer, Moments(inputs))
    assert family.ranks() == [(6,)]
    form = family.build((6,))
    seen = tensor_of((5, 40)) @ weight_of(40, seed=1, rank=6)
    assert relative(form(seen), layer(seen)) < 2e-3
    # Two of the outputs alone matter.
    gradients = torch.zeros(32, 32, dtype=torch.float64)
    gradients[:2, :2] = torch.eye(2)
    assert FullRank(alignment=1).fit(layer, Moments(inputs, gradients)).ranks() == [(2,)]


def test_the_tolerance_bounds_the_loss() -> None:
    layer, inputs = nn.Linear(40, 32, dtype=torch.float64), weight_of(40, seed=1)
    ranks = []
    for tolerance in (0.0, 0.05, 0.2, 0.5):
        family = FullRank(alignment=1, tolerance=tolerance).fit(layer, Moments(inputs))
        (rank,) = family.ranks()
        assert family.loss(rank) <= tolerance**2 + 1e-12
        if rank > (1,):
            assert family.loss((rank[0] - 1,)) > tolerance**2
        ranks.append(rank)
    assert ranks == sorted(ranks, reverse=True) and ranks[0] == (32,) > ranks[-1]
    for senseless in (-0.1, 1.0):
        with pytest.raises(ValueError, match="tolerance"):
            FullRank(tolerance=senseless)


def test_the_group_of_the_greatest_rank_decides() -> None:
    layer = nn.Conv2d(32, 32, 3, groups=2, dtype=torch.float64)
    with torch.no_grad():
        for place, rank in ((slice(0, 16), 3), (slice(16, 32), 5)):
            layer.weight[place] = of_rank(nn.Conv2d(16, 16, 3).double(), rank).weight
    family = reduction.fit(FullRank(alignment=1), layer, WEIGHT_METRIC)
    assert family.ranks() == [(5,)]
    assert relative(family.build((5,)).to_dense().weight, layer.weight) < 1e-12


def test_a_network_with_a_merged_layer_loses_nothing_and_gets_cheaper() -> None:
    model = nn.Sequential(of_rank(nn.Linear(64, 64), 8), nn.ReLU(), nn.Linear(64, 10)).eval()
    data = [tensor_of((16, 64), torch.float32)]
    plan = rankfold.analyze(model, data, methods=[FullRank()], metric="weight").plan(macs=0.5)
    (entry,) = plan.factorized
    assert (entry.name, entry.rank) == ("0", (8,))
    with torch.no_grad():
        assert relative(rankfold.factorize(model, plan)(data[0]), model(data[0])) < 1e-5
