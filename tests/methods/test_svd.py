"""Embeddings, and weights that they share with linear layers; the laws are in test_methods.py."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rankfold
from rankfold.cost import count_parameters
from rankfold.errors import TensorError
from rankfold.layers import TiedLayers, TransposedLinear, TwoFactorEmbedding
from rankfold.methods import METHODS, WEIGHT_METRIC, LowRank, Moments, Tucker2, reduction
from rankfold.methods.svd import low_rank_factors


def positive(size: int) -> torch.Tensor:
    root = torch.randn(size, size, dtype=torch.float64)
    return root @ root.mT


@given(st.integers(2, 12), st.integers(2, 12), st.booleans(), st.booleans(), st.data())
@settings(max_examples=30, deadline=None)
def test_an_embedding_is_a_linear_layer_of_one_hot_inputs(
    count: int, width: int, inputs: bool, gradients: bool, data
) -> None:
    torch.manual_seed(data.draw(st.integers(0, 100)))
    layer = nn.Embedding(count, width, dtype=torch.float64)
    linear = nn.Linear(count, width, bias=False, dtype=torch.float64)
    linear.weight.data = layer.weight.detach().mT.clone()
    frequencies = torch.rand(count, dtype=torch.float64) + 0.1
    outputs = positive(width) if gradients else None
    ours = Moments(frequencies if inputs else None, outputs, 2.0)
    theirs = Moments(frequencies.diag() if inputs else None, outputs, 2.0)
    families = [LowRank().fit(layer, ours), LowRank().fit(linear, theirs)]
    rank = (data.draw(st.integers(1, min(count, width))),)
    losses = [family.loss(rank) for family in families]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-9)
    found, expected = (family.build(rank).to_dense().weight for family in families)
    # That the products agree, not the factors; the loss that was predicted is that of the weight.
    torch.testing.assert_close(found.mT, expected, rtol=1e-5, atol=1e-6)
    measured = ours.loss_of(ours.squared_error((found - layer.weight).detach().mT), found.mT)
    assert measured.item() == pytest.approx(losses[0], rel=1e-6, abs=1e-9)


@given(
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.booleans(),
    st.booleans(),
    st.integers(0, 30),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_factors_up_to_a_rank_are_the_best_in_the_metric(
    shape: tuple[int, int], inputs: bool, gradients: bool, lacking: int, data
) -> None:
    torch.manual_seed(data.draw(st.integers(0, 100)))
    rank = data.draw(st.integers(1, min(shape)))
    weight = torch.randn(shape, dtype=torch.float64)
    samples = torch.randn(max(1, shape[1] - lacking), shape[1], dtype=torch.float64)
    moments = Moments(
        samples.mT @ samples if inputs else None, positive(shape[0]) if gradients else None, 1.0
    )
    left, right, values = low_rank_factors(weight, moments, rank)
    assert left.shape == (shape[0], rank) and right.shape == (rank, shape[1])
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))
    error = moments.squared_error(weight - left @ right)
    # No approximation of the rank does better than the values say (Eckart and Young 1936), whose
    # squares are the eigenvalues of the whitened weight's Gram matrix.
    gram = moments.times_gradients(moments.times_inputs(weight)) @ weight.mT
    squares = torch.linalg.eigvals(gram).real.sort(descending=True).values[: len(values)]
    whole = squares.sum().item()
    torch.testing.assert_close(values.square(), squares.clamp_min(0), rtol=0, atol=1e-7 * whole)
    assert error == pytest.approx(values[rank:].square().sum().item(), abs=1e-7 * whole)


def test_frequent_tokens_are_kept_nearer() -> None:
    torch.manual_seed(0)
    layer = nn.Embedding(40, 16)
    frequencies = torch.full((40,), 1e-3, dtype=torch.float64)
    frequencies[:4] = 1
    found = LowRank().fit(layer, Moments(frequencies)).build((8,)).to_dense().weight
    errors = (found - layer.weight).norm(dim=1)
    assert errors[:4].max() < 0.05 * errors[4:].min()


def test_the_padding_row_stays_zero() -> None:
    layer = nn.Embedding(20, 12, padding_idx=3).eval()
    form = LowRank().fit(layer, Moments(torch.rand(20).double() + 0.1)).build((4,))
    assert isinstance(form, TwoFactorEmbedding) and not form.training
    ids = torch.tensor([3, 5])
    form(ids).sum().backward()
    assert not form(ids)[0].any() and not form[0].weight.grad[3].any()
    assert repr(form.to_dense()) == repr(layer)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"max_norm": 1.0}, "max_norm"),
        ({"sparse": True}, "sparse"),
        ({"scale_grad_by_freq": True}, "scale_grad_by_freq"),
    ],
)
def test_embeddings_that_factors_could_not_be(settings: dict, reason: str) -> None:
    layer = nn.Embedding(20, 12, **settings)
    assert reason in LowRank().why_not(layer)
    linear = nn.Linear(12, 20)
    linear.weight = layer.weight
    assert reason in LowRank().why_not(TiedLayers([layer, linear]))
    others = set(METHODS) - {"svd", "full-rank", "tensor-train-embedding"}
    assert all(METHODS[name]().why_not(nn.Embedding(20, 12)) for name in others)


def test_diagonals_for_methods_that_know_matrices() -> None:
    layer, diagonal = nn.Linear(16, 24), torch.rand(24, dtype=torch.float64) + 0.1
    method = METHODS["interpolative"]()
    rank = (8,)
    ours = reduction.fit(method, layer, Moments(positive(16), diagonal, 3.0))
    inputs = ours.moments.inputs
    mean = diagonal.mean().item()
    theirs = reduction.fit(method, layer, Moments(inputs, None, 3.0 * mean))
    assert ours.loss(rank) == pytest.approx(theirs.loss(rank))
    # svd knows them.
    known = LowRank().fit(layer, Moments(inputs, diagonal, 3.0))
    whole = LowRank().fit(layer, Moments(inputs, diagonal.diag(), 3.0))
    assert known.loss(rank) == pytest.approx(whole.loss(rank))


def test_full_rank_finds_the_rank_of_an_embedding() -> None:
    layer = nn.Embedding(60, 40)
    layer.weight.data = torch.randn(60, 8) @ torch.randn(8, 40)
    family = METHODS["full-rank"]().fit(layer, WEIGHT_METRIC)
    assert family.ranks() == [(8,)]
    torch.testing.assert_close(family.build((8,)).to_dense().weight, layer.weight)


class LanguageModel(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(90, 32, padding_idx=0)
        self.hidden, self.out = nn.Linear(32, 32), nn.Linear(32, 90)
        if tied:
            self.out.weight = self.table.weight
        self.eval()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.hidden(self.table(ids))))


DATA = list(torch.randint(90, (6, 4, 10), generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("metric", ["weight", "response", "fisher", "asvd", "fwsvd", "svd-llm"])
def test_tied_weights_end_to_end(tmp_path, metric: str) -> None:
    model = LanguageModel()
    analysis = rankfold.analyze(model, DATA, metric=metric, check=False, layers="table")
    analysis.save(tmp_path / "analysis")
    plan = rankfold.Analysis.load(tmp_path / "analysis").plan(params=0.6)
    assert plan == analysis.plan(params=0.6)
    (entry,) = plan.factorized
    assert (entry.name, entry.tied) == ("table", ("out",))
    # Once for both: U, V and the bias of the one.
    assert entry.after.parameters == entry.rank[0] * (90 + 32) + 90
    assert entry.after.macs == 10 * entry.rank[0] * (32 + 32 + 90)
    small = rankfold.factorize(model, plan)
    assert count_parameters(small) == plan.after.parameters

    def is_tied(network: LanguageModel) -> bool:
        assert isinstance(network.out[0], TransposedLinear)
        pairs = zip(network.table, reversed(network.out), strict=True)
        return all(mine.weight is theirs.weight for mine, theirs in pairs)

    assert is_tied(small) and is_tied(copy.deepcopy(small))
    rankfold.recover(small, DATA, teacher=model, epochs=1)
    assert is_tied(small)
    rankfold.save(small, tmp_path / "small")
    loaded = rankfold.load(tmp_path / "small", LanguageModel)
    assert is_tied(loaded) and torch.equal(loaded(DATA[0]), small.eval()(DATA[0]))
    assert not loaded.table(torch.tensor(0)).any()
    refitted = rankfold.refit(loaded, model, DATA, ["table", "out"])
    assert [one.layer for one in refitted.layers] == ["table", "out"] and is_tied(loaded)
    with pytest.raises(rankfold.CheckpointError, match="tie"):
        rankfold.load(tmp_path / "small", LanguageModel(tied=False))


def test_an_embedding_pays_in_parameters_alone() -> None:
    model = LanguageModel(tied=False)
    analysis = rankfold.analyze(model, DATA, metric="fisher", check=False, timed=True)
    table = analysis.layers[0]
    assert table.name == "table" and table.macs == 0
    assert {c.rank for c in table.candidates} == {(8,), (16,)}
    assert {(c.parameters, c.macs) for c in table.candidates if c.rank == (8,)} == {
        (8 * (90 + 32), 40 * 8 * 32)
    }
    assert analysis.plan(macs=0.7).layers[0].method is None
    small = rankfold.factorize(model, analysis.plan(params=0.55))
    assert isinstance(small.table, TwoFactorEmbedding)


def test_factors_that_their_dtype_cannot_hold_are_refused() -> None:
    layer = nn.Conv2d(16, 12, 3, bias=False).half()
    drawn = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(3))
    layer.weight = nn.Parameter((drawn / drawn.abs().max() * 65504).half())
    with pytest.raises(TensorError, match=r"numbers beyond torch.float16"):
        Tucker2().fit(layer, Moments()).build((12, 16))
