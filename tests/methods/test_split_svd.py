"""The laws of test_methods.py, for layers that make queries, keys and values together."""

import dataclasses
import json
from itertools import pairwise

import pytest
import torch
from torch import nn

import rankfold
from rankfold.cost import count_layer_macs, count_parameters
from rankfold.errors import RankError
from rankfold.layers import FusedTwoFactorLinear
from rankfold.methods import METHODS, WEIGHT_METRIC, LowRank, Moments, SplitLowRank


def positive(size: int) -> torch.Tensor:
    root = torch.randn(size, size, dtype=torch.float64)
    return root @ root.mT


def layer_of(seed: int = 0, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(16, 48, bias, dtype=dtype)


METRICS = {
    "weight": lambda: WEIGHT_METRIC,
    "response": lambda: Moments(positive(16)),
    "fisher": lambda: Moments(positive(16), positive(48), 2.0),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_lost_at_full_rank(bias: bool, dtype: torch.dtype) -> None:
    layer = layer_of(0, bias, dtype).eval()
    layer.weight.requires_grad_(False)
    form = SplitLowRank().fit(layer, METRICS["response"]()).build((16, 16, 16))
    assert repr(form.to_dense()) == repr(layer) and not form.training
    torch.testing.assert_close(form.to_dense().weight, layer.weight, rtol=1e-4, atol=1e-5)
    assert {p.dtype for p in form.parameters()} == {dtype}
    trained = {name.rpartition(".")[2]: p.requires_grad for name, p in form.named_parameters()}
    assert trained == ({"weight": False, "bias": True} if bias else {"weight": False})
    if bias:
        assert torch.equal(form.to_dense().bias, layer.bias)


@pytest.mark.parametrize("metric", METRICS)
def test_each_part_is_its_own_decomposition(metric: str) -> None:
    layer, moments = layer_of(), METRICS[metric]()
    family = SplitLowRank(alignment=1).fit(layer, moments)
    rank = (3, 1, 5)
    found = family.build(rank).to_dense().weight.detach()
    for place, r in enumerate(rank):
        rows = slice(16 * place, 16 * place + 16)
        part = nn.Linear(16, 16, False)
        part.weight.data = layer.weight.detach()[rows]
        block = None if moments.gradients is None else moments.gradients[rows, rows]
        expected = LowRank(1).fit(part, Moments(moments.inputs, block)).build((r,))
        torch.testing.assert_close(found[rows], expected.to_dense().weight, rtol=1e-3, atol=1e-4)
    if metric != "fisher":  # whose blocks between parts are left out
        measured = moments.loss_of(moments.squared_error(found - layer.weight), layer.weight)
        assert family.loss(rank) == pytest.approx(measured.item(), rel=1e-4)


def test_candidates_raise_the_rank_that_is_missed_most() -> None:
    layer = layer_of()
    with torch.no_grad():
        layer.weight[:16] = 100 * torch.linalg.qr(torch.randn(16, 16)).Q
        layer.weight[16:32] = torch.randn(16, 2) @ torch.randn(2, 16)
    family = SplitLowRank(alignment=2).fit(layer, WEIGHT_METRIC)
    ranks = family.ranks()
    assert ranks[0] == (2, 2, 2) and ranks[-1] == (16, 16, 16)
    assert len(ranks) == len(set(ranks)) == 1 + 3 * 7
    for fewer, more in pairwise(ranks):
        assert sum(more) == sum(fewer) + 2
        assert family.loss(more) <= family.loss(fewer) + 1e-12
    assert (16, 2, 2) in ranks  # the large part first; the one of rank two, last
    assert [shape.shape for shape in family.spectra] == [(16, 16)] * 3


def test_cost_by_hand_and_bounds() -> None:
    layer, method = layer_of(), SplitLowRank()
    form = method.skeleton(layer, (8, 4, 2))
    assert count_parameters(form) == 14 * (16 + 16) + 48
    assert count_layer_macs(form, [(3, 16)]) == 3 * 14 * 32
    family = method.fit(layer, WEIGHT_METRIC)
    for rank in ((0, 1, 1), (1, 17, 1), (1, 1)):
        for call in (family.build, family.loss, lambda r: method.skeleton(layer, r)):
            with pytest.raises(RankError):
                call(rank)
    assert method.why_not(nn.Linear(16, 32)) == "16 to 32 features are no 3 layers side by side"
    assert SplitLowRank(parts=2).why_not(nn.Linear(16, 32)) is None
    settings = json.loads(json.dumps(dataclasses.asdict(SplitLowRank(4, 2))))
    assert METHODS["split-svd"](**settings) == SplitLowRank(4, 2)
    with pytest.raises(ValueError, match="parts"):
        SplitLowRank(parts=1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (one.unflatten(-1, (4, 8)).transpose(1, 2) for one in self.qkv(x).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))


def test_it_competes_with_the_whole(tmp_path) -> None:
    """Queries and keys of low rank in spaces of their own: the parts cost less."""
    torch.manual_seed(0)
    model = Attention().eval()
    with torch.no_grad():
        for start in (0, 32, 64):
            left, right = torch.randn(32, 8) / 8, torch.randn(8, 32) / 4
            model.qkv.weight[start : start + 32] = left @ right
    data = list(torch.randn(6, 4, 9, 32))
    analysis = rankfold.analyze(model, data, metric="response", check=False)
    plan = analysis.plan(params=0.7)
    entry = plan.layers[0]
    assert (entry.name, entry.method, entry.rank) == ("qkv", "split-svd", (8, 8, 8))
    small = rankfold.factorize(model, plan)
    assert isinstance(small.qkv, FusedTwoFactorLinear)
    rankfold.save(small, tmp_path / "small")
    assert torch.equal(rankfold.load(tmp_path / "small", Attention)(data[0]), small(data[0]))
