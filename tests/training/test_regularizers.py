"""Penalties of weights, against their definitions."""

import pytest
import torch
from geometry import layers
from hypothesis import assume, given
from hypothesis import strategies as st
from networks import make_data, make_model
from tensors import tensor_of
from torch import nn

import rankfold
from rankfold.errors import RankfoldError
from rankfold.methods import METHODS, WEIGHT_METRIC, reduction
from rankfold.nn import LowRankConv2d, LowRankLinear, TensorTrainLinear
from rankfold.training import FrobeniusDecay, NuclearNorm, Orthogonality

ALL = [Orthogonality(0.1), NuclearNorm(0.1), FrobeniusDecay(0.1)]
TWO_FACTORS = ["svd", "separable"]


def form_of(name: str, layer: nn.Module, rank: int | None = None) -> nn.Module:
    family = reduction.fit(METHODS[name](alignment=1), layer, WEIGHT_METRIC)
    ranks = list(family.ranks())
    return family.build(ranks[-1] if rank is None else ranks[min(rank, len(ranks)) - 1])


@given(layers(torch.float64), st.sampled_from([*TWO_FACTORS, "tucker2"]))
def test_the_decay_of_factors_is_that_of_the_dense_layer(layer_and_shape, name) -> None:
    layer, _ = layer_and_shape
    assume(reduction.why_not(METHODS[name](alignment=1), layer) is None)
    form = form_of(name, layer)
    decay = FrobeniusDecay(0.5)
    torch.testing.assert_close(decay(form), layer.weight.square().sum() / 4)
    torch.testing.assert_close(decay(layer), layer.weight.square().sum() / 4)


@given(layers(torch.float64), st.sampled_from(TWO_FACTORS))
def test_balanced_factors_of_an_svd_have_the_nuclear_norm_of_what_they_factor(drawn, name) -> None:
    """At its least over all factors of one product; every other pair has more."""
    layer, _ = drawn
    method = METHODS[name](alignment=1)
    assume(reduction.why_not(method, layer) is None)
    family = reduction.fit(method, layer, WEIGHT_METRIC)
    form = family.build(max(family.ranks()))
    found = NuclearNorm(1.0)(form)
    if getattr(layer, "groups", 1) == 1 and not getattr(layer, "transposed", False):
        expected = family.spectra[0].singular_values.sum()
        torch.testing.assert_close(found, expected)
    with torch.no_grad():
        form[0].weight *= 2
        form[1].weight /= 2
    assert NuclearNorm(1.0)(form) >= found - 1e-9


@given(layers(torch.float64))
def test_the_nuclear_norm_of_a_dense_layer_is_that_of_its_unfolding(drawn) -> None:
    layer, _ = drawn
    assume(getattr(layer, "groups", 1) == 1 and not getattr(layer, "transposed", False))
    expected = torch.linalg.matrix_norm(layer.weight.flatten(1), "nuc")
    torch.testing.assert_close(NuclearNorm(0.5)(layer), expected / 2)


def test_the_subgradient_of_the_nuclear_norm_is_that_of_the_svd() -> None:
    layer = nn.Linear(7, 5, dtype=torch.float64)
    NuclearNorm(1.0)(layer).backward()
    left, _, right = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    torch.testing.assert_close(layer.weight.grad, left @ right)


def test_training_with_the_nuclear_norm_lowers_the_rank() -> None:
    """The best fit of noisy data is of full rank, with the penalty of the rank of the signal."""
    inputs = torch.randn(200, 8)
    target = inputs @ (tensor_of((8, 2)) @ tensor_of((2, 8), seed=1)).float()
    target = target + torch.randn(200, 8)
    ranks = []
    for strength in (0.0, 0.1):
        layer, penalty = LowRankLinear(8, 8, 8, bias=False), NuclearNorm(strength)
        optimizer = torch.optim.Adam(layer.parameters(), 2e-2)
        for _ in range(500):
            loss = (layer(inputs) - target).square().mean() + penalty(layer)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        values = torch.linalg.svdvals(layer.to_dense().weight.detach())
        ranks.append(int((values > 1e-3 * values[0]).sum()))
    assert ranks == [8, 2]


@given(st.sampled_from(["svd", "tucker2", "separable", "tensor-train"]), st.integers(1, 12))
def test_orthogonal_factors_cost_nothing_and_the_others_do(name, rank) -> None:
    """The factors of an SVD are orthogonal; any mixture of them is not."""
    layer = nn.Conv2d(12, 14, 3, dtype=torch.float64)
    form = form_of(name, layer, rank)
    assert Orthogonality(1.0)(form).item() < 1e-9
    with torch.no_grad():
        form[0].weight *= torch.rand(len(form[0].weight), 1, 1, 1).double() + 0.5
    assert Orthogonality(1.0)(form).item() < 1e-9  # lengths cost nothing
    if len(form[0].weight) > 1:
        with torch.no_grad():
            form[0].weight[1] = form[0].weight[0]
        # The cosine of two that are the same, both ways round.
        assert Orthogonality(1.0)(form).item() == pytest.approx(2)


def test_groups_are_orthogonal_by_themselves() -> None:
    layer = nn.Conv2d(8, 8, 3, groups=2, dtype=torch.float64)
    form = form_of("svd", layer, 3)
    assert Orthogonality(1.0)(form).item() < 1e-9
    rank = len(form[0].weight) // 2
    with torch.no_grad():
        form[0].weight[rank:] = form[0].weight[:rank]  # alike in different groups
    assert Orthogonality(1.0)(form).item() < 1e-9


def test_it_goes_down_in_training() -> None:
    layer = LowRankConv2d(4, 8, 3, 6)
    before = Orthogonality(1.0)(layer).item()
    data = [(torch.randn(4, 4, 8, 8), torch.zeros(4, 8, 6, 6))]
    rankfold.recover(
        layer,
        data,
        loss_fn=lambda output, label: 0 * output.sum(),
        penalty=Orthogonality(1.0),
        epochs=50,
        patience=50,
        learning_rate=1e-2,
    )
    assert Orthogonality(1.0)(layer).item() < 0.1 * before


@pytest.mark.parametrize("penalty", ALL, ids=str)
def test_whole_networks_get_finite_gradients_in_every_factor_that_counts(penalty) -> None:
    model = make_model()
    analysis = rankfold.analyze(model, make_data(), metric="weight")
    small = rankfold.factorize(model, analysis.plan(fraction=0.4))
    value = penalty(small)
    assert value.shape == () and value > 0
    value.backward()
    reached = [own for own in small.parameters() if own.grad is not None]
    assert reached and all(torch.isfinite(own.grad).all() for own in reached)
    assert small.head[0].weight.grad.any() and small.head[1].weight.grad.any()


@pytest.mark.parametrize("penalty", ALL, ids=str)
def test_a_network_without_any_such_layer_costs_nothing(penalty) -> None:
    assert penalty(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())).item() == 0
    assert type(penalty)(0.1, layers="nowhere*")(make_model()).item() == 0


def test_layers_of_small_tensors_decay_as_the_weight_they_make() -> None:
    layer = TensorTrainLinear(16, 16, 2)
    expected = layer.to_dense().weight.square().sum()
    torch.testing.assert_close(FrobeniusDecay(2.0)(layer), expected)


def test_strengths_that_make_no_sense_are_refused() -> None:
    for kind in (Orthogonality, NuclearNorm, FrobeniusDecay):
        for strength in (-1.0, float("nan"), float("inf")):
            with pytest.raises(RankfoldError, match="strength"):
                kind(strength)
