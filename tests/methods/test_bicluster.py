import pytest
import torch
from geometry import relative
from tensors import tensor_of, weight_of
from torch import nn

import rankfold
from rankfold.cost import count_layer_macs, count_parameters
from rankfold.errors import RankError
from rankfold.layers import BiclusteredConvolution
from rankfold.methods import METHODS, WEIGHT_METRIC, Bicluster, Moments


def of_blocks(outputs: int, inputs: int, rank: int) -> nn.Conv2d:
    """A layer of two groups on both sides, its channels shuffled."""
    rows = []
    for g in range(2):
        blocks = []
        for h in range(2):
            seed = 10 * g + h
            # A group's blocks have inputs and outputs of their own.
            first = tensor_of((rank, inputs // 2), seed=seed + 1)
            core = tensor_of((rank, rank, 3, 3), seed=seed + 2)
            last = tensor_of((outputs // 2, rank), seed=seed + 3)
            blocks.append(torch.einsum("oq,qrhw,ri->oihw", last, core, first))
        rows.append(torch.cat(blocks, 1))
    weight = torch.cat(rows)
    generator = torch.Generator().manual_seed(3)
    weight = weight[torch.randperm(outputs, generator=generator)]
    weight = weight[:, torch.randperm(inputs, generator=generator)]
    layer = nn.Conv2d(inputs, outputs, 3, padding=1, dtype=torch.float64)
    layer.weight = nn.Parameter(weight)
    return layer


def lost(form: nn.Module, layer: nn.Module, moments: Moments) -> float:
    weight = layer.weight.detach()
    difference = form.to_dense().weight.detach() - weight
    return moments.squared_error(difference) / moments.squared_error(weight)


@pytest.mark.parametrize("metric", ["weight", "both"])
def test_clusters_of_low_rank_are_found(metric) -> None:
    layer = of_blocks(32, 24, 2)
    moments = Moments()
    if metric == "both":
        # Channels of any scale.
        scales = [1 + tensor_of((n,), seed=n).square() for n in (24, 32)]
        moments = Moments(*(torch.diag(one) for one in scales))
    form = Bicluster(alignment=1).fit(layer, moments).build((2, 2))
    assert relative(form.to_dense().weight, layer.weight) < 1e-6


def test_one_group_on_both_sides_is_tucker2() -> None:
    layer = nn.Conv2d(16, 24, 3, dtype=torch.float64)
    form = Bicluster(output_groups=1, input_groups=1).fit(layer, WEIGHT_METRIC).build((8, 8))
    peer = METHODS["tucker2"]().fit(layer, WEIGHT_METRIC).build((8, 8))
    assert len(form) == 3
    assert relative(form.to_dense().weight, peer.to_dense().weight) < 1e-9


@pytest.mark.parametrize("groups", [(1, 2), (2, 1), (2, 3), (4, 2)])
@pytest.mark.parametrize("blocks", ["svd", "outer-product"])
def test_any_groups_are_the_dense_layer_that_they_represent(groups, blocks) -> None:
    layer = nn.Conv2d(12, 16, (3, 2), stride=2, padding=(1, 0), dilation=(1, 2)).double()
    method = Bicluster(1, blocks, *groups)
    family = method.fit(layer, WEIGHT_METRIC)
    rank = family.ranks()[len(family.ranks()) // 2]
    form = family.build(rank)
    dense = form.to_dense()
    given = tensor_of((2, 12, 7, 8))
    assert repr(dense) == repr(layer) and torch.equal(dense.bias, layer.bias)
    assert relative(form(given), dense(given)) < 1e-12
    assert repr(method.skeleton(layer, rank)) == repr(form)
    if blocks == "svd":
        assert relative(family.build(max(family.ranks())).to_dense().weight, layer.weight) < 1e-12


@pytest.mark.parametrize("inputs", [{"length": 16}, {"length": 144}])
@pytest.mark.parametrize("blocks", ["svd", "outer-product"])
def test_blocks_make_up_for_each_others_errors(inputs, blocks) -> None:
    """What one sweep, and one from blocks fitted apart, leave is more than what several do."""
    layer = nn.Conv2d(16, 16, 3, dtype=torch.float64)
    moments = Moments(weight_of(inputs["length"], 1), weight_of(16, 2))
    rank = (4, 4) if blocks == "svd" else (6,)
    family = Bicluster(alignment=1, blocks=blocks).fit(layer, moments)
    built, draft = family.build(rank), family.draft(rank)
    assert lost(built, layer, moments) < lost(draft, layer, moments)


def test_more_outer_products_are_nearer() -> None:
    layer = nn.Conv2d(16, 16, 3, dtype=torch.float64)
    family = Bicluster(alignment=1, blocks="outer-product").fit(layer, WEIGHT_METRIC)
    errors = [lost(family.build((rank,)), layer, WEIGHT_METRIC) for rank in (2, 6, 12)]
    assert errors[0] > errors[1] > errors[2] > 0
    assert max(family.ranks()) <= (8 * 8 * 9 // (8 + 8 + 9),)


def test_costs_by_hand() -> None:
    layer = nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=False)
    form = Bicluster(alignment=4).skeleton(layer, (6, 4))
    first, core, last = 16 * 2 * 4, 4 * 4 * 6 * 9, 2 * 6 * 24
    assert count_parameters(form) == first + core + last
    assert count_layer_macs(form, [(1, 16, 10, 10)]) == first * 100 + (core + last) * 25
    form = Bicluster(alignment=4, blocks="outer-product").skeleton(layer, (5,))
    assert count_parameters(form) == 16 * 2 * 5 + 4 * 5 * 9 + 2 * 5 * 24


def test_exports_and_round_trips_like_any_module() -> None:
    layer = nn.Conv2d(16, 24, 3, padding=1, stride=(2, 1), dilation=(1, 2))
    form = Bicluster().fit(layer, WEIGHT_METRIC).build((8, 8)).eval()
    given = torch.randn(2, 16, 7, 7)
    torch.testing.assert_close(torch.export.export(form, (given,)).module()(given), form(given))
    orders = torch.zeros(24, dtype=torch.int64), torch.zeros(16, dtype=torch.int64)
    other = BiclusteredConvolution(layer, (2, 2), (8, 8), orders).eval()
    other.load_state_dict(form.state_dict())
    assert torch.equal(other(given), form(given))


def test_a_network_is_saved_and_loaded(tmp_path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Flatten(), nn.Linear(512, 5)
        ).eval()

    data = list(tensor_of((12, 3, 8, 8), torch.float32).split(3))
    analysis = rankfold.analyze(make(), data, methods=["bicluster"])
    plan = analysis.plan(macs=0.6)
    assert [entry.method for entry in plan.factorized] == ["bicluster"]
    small = rankfold.factorize(make(), plan, analysis=analysis)
    rankfold.save(small, tmp_path / "small")
    loaded = rankfold.load(tmp_path / "small", like=make)
    with torch.no_grad():
        assert torch.equal(loaded(data[0]), small(data[0]))


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.Conv2d(33, 64, 3), "2 groups do not divide 33 input channels"),
        (nn.Conv2d(64, 17, 3), "2 groups do not divide 17 output channels"),
        (nn.Conv2d(8, 64, 3), "only 4 input and 32 output channels in a group"),
        (nn.Conv2d(16, 16, 3), "only 8 input and 8 output channels in a group"),
        (nn.Conv2d(32, 64, 1), "no spatial modes"),
        (nn.Conv2d(32, 64, 3, groups=2), "groups=2"),
    ],
)
def test_why_a_layer_is_left(layer, words) -> None:
    assert words in Bicluster().why_not(layer)


def test_senseless_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="svd, outer-product"):
        Bicluster(blocks="cp")
    for settings in ({"output_groups": 0}, {"input_groups": True}):
        with pytest.raises(ValueError, match="integer of at least 1"):
            Bicluster(**settings)
    orders = torch.arange(16), torch.arange(16)
    for groups, ranks in (((3, 2), (4, 4)), ((2, 2), (0, 4))):
        with pytest.raises(RankError):
            BiclusteredConvolution(nn.Conv2d(16, 16, 3), groups, ranks, orders)
    with pytest.raises(RankError, match="depthwise"):
        BiclusteredConvolution(nn.Conv2d(16, 16, 3), (2, 2), (4, 2), orders, depthwise=True)
