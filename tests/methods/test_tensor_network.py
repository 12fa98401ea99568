"""Tensor networks fitted to linear layers, each as its method has it."""

import math

import pytest
import torch
from geometry import relative
from tensors import tensor_of, weight_of
from torch import nn

from rankfold.cost import count_parameters
from rankfold.layers import factors_of
from rankfold.methods import METHODS, WEIGHT_METRIC, Moments
from rankfold.methods.tensor_network import mean_of_mode

NAMES = ["tensorized-train", "tensor-ring", "block-term", "cp", "tensorized-tucker", "kronecker"]
# A small rank of each that a fit finds again, and the alignment of its candidates.
RANKS = {"tensor-ring": 3, "block-term": 1, "cp": 2, "tensorized-tucker": 2}
names = pytest.mark.parametrize("name", NAMES)


def layer_of(given: int, made: int) -> nn.Linear:
    layer = nn.Linear(given, made, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(tensor_of(layer.weight.shape, seed=1))
    return layer


def error(form: nn.Module, layer: nn.Linear, moments: Moments) -> float:
    weight = layer.weight.detach()
    return moments.squared_error(form.to_dense().weight.detach() - weight)


def random_network(name: str, layer: nn.Linear) -> nn.Linear:
    """A layer that is such a network, of random factors."""
    settings = {"slices": 1} if name == "tensor-ring" else {}
    form = METHODS[name](alignment=2, **settings).skeleton(layer, (RANKS.get(name, 2),))
    form = form.to_empty(device="cpu")
    for place, one in enumerate(factors_of(form)):
        one.weight = nn.Parameter(tensor_of(one.weight.shape, seed=place))
    form[-1].bias = nn.Parameter(tensor_of(form[-1].bias.shape))
    return form.to_dense()


@names
def test_a_network_of_small_rank_is_recovered(name) -> None:
    exact = random_network(name, layer_of(24, 36))
    settings = {"slices": 1} if name == "tensor-ring" else {}
    family = METHODS[name](alignment=2, **settings).fit(exact, WEIGHT_METRIC)
    form = family.build((RANKS.get(name, 2),))
    assert relative(form.to_dense().weight, exact.weight) < 1e-5
    torch.testing.assert_close(form.to_dense().bias, exact.bias)


@names
@pytest.mark.parametrize("known", [(True, True), (True, False), (False, True)])
def test_the_metric_pays(name, known) -> None:
    """A fit in the metric is nearer in it than one of the weight alone."""
    layer = layer_of(48, 36)
    inputs, gradients = known
    moments = Moments(weight_of(48, 1) if inputs else None, weight_of(36, 2) if gradients else None)
    method = METHODS[name](alignment=2)
    *ranks, _ = method.fit(layer, WEIGHT_METRIC).ranks()
    rank = ranks[len(ranks) // 2]
    ours = error(method.fit(layer, moments).build(rank), layer, moments)
    plain = error(method.fit(layer, WEIGHT_METRIC).build(rank), layer, moments)
    assert ours < plain


def test_kronecker_products_are_the_svd_of_the_rearranged_weight() -> None:
    """Van Loan and Pitsianis 1993, theorem 2.1: no sum of so many products is nearer."""
    layer = layer_of(24, 36)  # 24 as 4 x 6, 36 as 6 x 6
    family = METHODS["kronecker"]().fit(layer, WEIGHT_METRIC)
    rearranged = layer.weight.detach().reshape(6, 6, 4, 6).permute(0, 2, 1, 3).reshape(24, 36)
    squares = torch.linalg.svdvals(rearranged).square()
    for rank in (1, 3, 8):
        lost = (squares[rank:].sum() / squares.sum()).sqrt().item()
        form = family.build((rank,))
        found = relative(form.to_dense().weight, layer.weight)
        assert found == pytest.approx(lost, rel=1e-6)
        assert family.loss((rank,)) >= (1 - 1e-3) * lost**2


@pytest.mark.parametrize("name", ["kronecker", "tensorized-train", "tensorized-tucker"])
def test_moments_that_are_kronecker_products_over_the_modes_are_met_exactly(name) -> None:
    """What is such a network in their coordinates is found."""
    exact = random_network(name, layer_of(24, 36))
    form = METHODS[name]().skeleton(exact, (2,))

    def product(lengths: tuple[int, ...], seed: int) -> torch.Tensor:
        whole = torch.ones(1, 1, dtype=torch.float64)
        for place, length in enumerate(lengths):
            whole = torch.kron(whole, weight_of(length, seed + place))
        return whole

    moments = Moments(product(form.in_modes, 1), product(form.out_modes, 11))
    found = METHODS[name]().fit(exact, moments).build((2,))
    whole = moments.squared_error(exact.weight.detach())
    assert error(found, exact, moments) < 1e-9 * whole


def test_the_moment_of_a_mode_is_the_mean_over_the_others() -> None:
    moment, lengths = weight_of(12), (3, 4)
    split = moment.reshape(3, 4, 3, 4)
    first = sum(split[:, n, :, n] for n in range(4)) / 4
    torch.testing.assert_close(mean_of_mode(moment, lengths, 0), first)
    diagonal = moment.diagonal()
    second = mean_of_mode(diagonal.diag(), lengths, 1)
    torch.testing.assert_close(mean_of_mode(diagonal, lengths, 1), second)


@names
def test_candidates_save_parameters(name) -> None:
    layer = nn.Linear(128, 128)
    method = METHODS[name]()
    *saving, _ = method.fit(layer, WEIGHT_METRIC).ranks()
    numbers = [count_parameters(method.skeleton(layer, rank)) for rank in saving]
    assert numbers == sorted(numbers) and numbers[-1] < count_parameters(layer)


@names
def test_layers_of_one_feature_are_left_and_primes_are_not(name) -> None:
    method = METHODS[name]()
    assert "only 1 feature" in method.why_not(nn.Linear(1, 64))
    assert "only 1 feature" in method.why_not(nn.Linear(64, 1))
    layer = nn.Linear(17, 13)
    family = method.fit(layer, WEIGHT_METRIC)
    assert relative(family.build(family.ranks()[-1]).to_dense().weight, layer.weight) < 1e-5


@pytest.mark.parametrize(
    ("name", "setting"),
    [("tensor-ring", "modes"), ("block-term", "modes"), ("tensorized-tucker", "modes")],
)
@pytest.mark.parametrize("value", [0, -1, 2.0, "2", True])
def test_senseless_modes_are_refused(name, setting, value) -> None:
    with pytest.raises(ValueError, match=f"{setting} is an integer of at least 1"):
        METHODS[name](**{setting: value})


def test_blocks_that_hold_every_weight() -> None:
    """Of pairs of modes 8, 12 and 10 long in blocks of at most 8: all combinations of groups."""
    family = METHODS["block-term"]().fit(nn.Linear(40, 24), WEIGHT_METRIC)
    form = METHODS["block-term"]().skeleton(nn.Linear(40, 24), (1,))
    pairs = [a * b for a, b in zip(form.in_modes, form.out_modes, strict=True)]
    assert family.ranks()[-1] == (math.prod(-(-n // 8) for n in pairs),)
