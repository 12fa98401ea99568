"""The laws that every method for linear layers and convolutions keeps, run over `METHODS`.

Those for recurrent layers have the same laws in files of their own.
"""

import copy
import dataclasses
import functools
import json
from itertools import pairwise, product

import pytest
import torch
from costs import NETWORKS, cost_by_hand, network_cost
from geometry import layers, relative
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tensors import tensor_of, weight_of
from torch import nn

from rankfold.cost import count_layer_macs, count_parameters
from rankfold.errors import RankError
from rankfold.methods import METHODS, WEIGHT_METRIC, Method, Moments, aligned_ranks, reduction

KERNELS = [nn.Linear(40, 24), nn.Conv2d(32, 24, 3)]
# Of these layers a method takes one or the other, or it is for recurrent ones.
KERNEL_METHODS = {
    name: method
    for name, method in METHODS.items()
    if any(method().why_not(layer) is None for layer in KERNELS)
}
CONVOLUTION_METHODS = [
    name for name, method in METHODS.items() if method().why_not(KERNELS[1]) is None
]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
methods = st.sampled_from(sorted(KERNEL_METHODS))
seeds = st.integers(0, 1000)
several = settings(max_examples=60, suppress_health_check=[HealthCheck.filter_too_much])

# What a method cannot keep by its nature:
# Of one candidate, that loses nothing: in a metric, nothing of what the metric sees.
LOSSLESS = {"full-rank"}
# Of too few parameters at any rank to be the dense layer: at full rank as near as they come.
INEXACT = {"flattened", "monochromatic", "circulant", "toeplitz", "hankel"}
# Too slow to fit for all of the layers below.
SLOW = {"cp", "cp-separable", "tucker-cp", "block-term", "tensor-ring"}
# Each rank is a fit of its own, which finds a local optimum: a rank that a layer has exactly is
# found if it is small (see the methods' own tests), a loss between measured ones is an estimate.
APPROXIMATE = {
    *SLOW,
    "block-diagonal",
    "bicluster",
    "tensorized-train",
    "tensorized-tucker",
    "kronecker",
    "toeplitz-like",
    "monarch",
}
# Several factors are fitted in turn: from another start another optimum may be found.
ALTERNATING = {"tucker2", "separable3", "separable-basis", *INEXACT, *APPROXIMATE}
# The least error at a rank is out of reach: a layer of exactly this rank is approached.
APPROACHED = {"separable-basis"}
# A rank counts filters of one channel, or blocks, and needs no alignment.
COUNTED = {
    "separable-basis",
    "fixed-basis",
    "block-term",
    "tensorized-train",
    "tensorized-tucker",
    "kronecker",
    "toeplitz-like",
    "monarch",
}
# Its least rank holds all of a layer of few channels, and is no cheaper than that.
WIDE = {"block-diagonal"}
# One factor is given and frozen.
FROZEN = {"fixed-basis"}

ONE_OF_EACH_KIND = [
    nn.Conv1d(16, 20, 3, stride=2, padding=1),
    nn.Conv2d(20, 17, 3, padding="same", dilation=2, padding_mode="reflect"),
    nn.Conv3d(16, 16, 2, padding_mode="circular", padding=1),
    nn.Conv2d(16, 20, (3, 2), stride=2, groups=2),
    nn.ConvTranspose2d(20, 16, (3, 2), stride=(2, 1), output_padding=(1, 0)),
    nn.ConvTranspose1d(16, 20, 3, padding=1, groups=2, bias=False),
]
EXAMPLES = [
    *ONE_OF_EACH_KIND,
    nn.Linear(40, 24),
    nn.Linear(24, 40, bias=False),
    nn.Conv2d(16, 24, (3, 1), stride=(2, 1), padding=(1, 0), bias=False),
    nn.Conv2d(3, 32, 5),
    nn.Conv2d(32, 24, 1),
]


@dataclasses.dataclass(frozen=True)
class Reduced:
    """A method as the rest of rankfold uses it: for grouped and transposed convolutions too."""

    method: Method

    @property
    def name(self) -> str:
        return self.method.name

    def why_not(self, layer):
        return reduction.why_not(self.method, layer)

    def fit(self, layer, moments):
        return reduction.fit(self.method, layer, moments)

    def skeleton(self, layer, rank):
        return reduction.skeleton(self.method, layer, rank)


CASES = [
    pytest.param(Reduced(method()), layer, id=f"{name}-{layer}")
    for name, method in METHODS.items()
    for layer in ([*ONE_OF_EACH_KIND, nn.Linear(64, 48)] if name in SLOW else EXAMPLES)
    if reduction.why_not(method(), layer) is None
]
# What is known of the inputs (whole patches, or channels alone) and of the gradients.
KNOWN = [("patches", True), ("patches", False), ("channels", False), ("channels", True), ("", True)]
IN_A_METRIC = [
    pytest.param(*case.values, *known, id="-".join(map(str, (case.id, *known))))
    for case in CASES
    if case.values[0].name not in SLOW or case.values[1] not in ONE_OF_EACH_KIND[::2]
    for known in (KNOWN[::2] if case.values[0].name in ALTERNATING else KNOWN)
]


@functools.cache
def fitted(method: Reduced, layer: nn.Module):
    """In the weight metric; once for all tests that leave the layer as it is."""
    return method.fit(layer, WEIGHT_METRIC)


@functools.cache
def fitted_in_a_metric(method: Reduced, layer: nn.Module, *known, rank: int | None = None):
    """A layer, a metric and the family in it, likewise."""
    layer, moments = in_a_metric(layer, *known, rank=rank)
    return layer, moments, method.fit(layer, moments)


def groups_of(layer: nn.Module) -> int:
    return getattr(layer, "groups", 1)


def in_channels(layer: nn.Module) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def is_transposed(layer: nn.Module) -> bool:
    return getattr(layer, "transposed", False)


def applicable(name: str, layer: nn.Module) -> Reduced:
    method = Reduced(METHODS[name](alignment=1))
    assume(method.why_not(layer) is None)
    return method


def factors_of(form: nn.Module) -> list[nn.Module]:
    return [module for module in form.modules() if hasattr(module, "weight")]


def biases_of(form: nn.Module) -> list[torch.Tensor]:
    return [one.bias for one in form.modules() if getattr(one, "bias", None) is not None]


def with_random_factors(form: nn.Module, seed: int) -> nn.Module:
    with torch.no_grad():
        for place, factor in enumerate(factors_of(form)):
            if factor.weight.requires_grad:  # or it is given
                factor.weight.copy_(tensor_of(factor.weight.shape, seed=seed + 1000 * place))
    return form


def full_rank(family) -> tuple[int, ...]:
    return max(family.ranks())


def tried_ranks(method: Reduced, family) -> list[tuple[int, ...]]:
    """All; where each is improved by iteration: the least, one in the middle, and full rank."""
    ranks = list(family.ranks())
    if method.name not in ALTERNATING:
        return ranks
    return sorted({ranks[0], ranks[len(ranks) // 2], ranks[-1]})


def reachable(method: str, tolerance: float) -> float:
    """The greatest relative error of the weight at full rank."""
    return 1 if method in INEXACT else tolerance


def weight_error(form, layer) -> float:
    return relative(form.to_dense().weight.detach(), layer.weight.detach())


@several
@given(methods, st.data(), st.sampled_from(list(TOLERANCE)), seeds)
def test_at_full_rank_nothing_changes(name, data, dtype, seed) -> None:
    layer, shape = data.draw(layers(dtype, channels=st.integers(1, 12)))
    method = applicable(name, layer)
    family = method.fit(layer, WEIGHT_METRIC)
    form = family.build(full_rank(family))
    inputs = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        assert form(inputs).shape == layer(inputs).shape
        # Where the terms of an output cancel, rounding is relative to the terms, not to their sum.
        terms = copy.deepcopy(layer)
        for parameter in terms.parameters():
            parameter.abs_()
        difference = (form(inputs) - layer(inputs)).norm()
        assert difference <= reachable(name, TOLERANCE[dtype]) * terms(inputs.abs()).norm()


@several
@given(methods, st.data(), seeds)
def test_the_form_is_the_dense_layer_that_it_represents(name, data, seed) -> None:
    """For random factors, and in every geometry."""
    layer, shape = data.draw(layers(torch.float64, channels=st.integers(1, 12)))
    method = applicable(name, layer)
    family = method.fit(layer, WEIGHT_METRIC)
    rank = data.draw(st.sampled_from(list(family.ranks())))
    skeleton = method.skeleton(layer, rank)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    fitted = skeleton.to_empty(device="cpu") if name in SLOW else family.build(rank)
    form = with_random_factors(fitted, seed)
    for bias in biases_of(form):
        nn.init.normal_(bias)
    dense = form.to_dense()
    assert repr(dense) == repr(layer) and type(dense) is type(layer)
    inputs = tensor_of(shape, seed=seed)
    with torch.no_grad():
        assert relative(form(inputs), dense(inputs)) < 1e-10


@several
@given(methods, st.data())
def test_skeleton_and_fitted_layer_agree(name, data) -> None:
    layer, _ = data.draw(layers(channels=st.integers(1, 12)))
    method = applicable(name, layer)
    family = method.fit(layer, WEIGHT_METRIC)
    rank = data.draw(st.sampled_from(list(family.ranks())))
    skeleton, form = method.skeleton(layer, rank), family.build(rank)
    assert {n: v.shape for n, v in skeleton.state_dict().items()} == {
        n: v.shape for n, v in form.state_dict().items()
    }
    assert {n: p.requires_grad for n, p in skeleton.named_parameters()} == {
        n: p.requires_grad for n, p in form.named_parameters()
    }
    assert repr(skeleton) == repr(form)


@several
@given(methods, st.data())
def test_the_loss_is_the_error_and_does_not_grow_with_rank(name, data) -> None:
    layer, _ = data.draw(layers(torch.float64, channels=st.integers(2, 6)))
    family = applicable(name, layer).fit(layer, WEIGHT_METRIC)
    rank = data.draw(st.sampled_from(list(family.ranks())))
    error = weight_error(family.build(rank), layer) ** 2
    if name in ("svd", "full-rank", "interpolative"):
        assert family.loss(rank) == pytest.approx(error, abs=1e-9)
    assert error <= (1.1 if name in APPROXIMATE else 1) * family.loss(rank) + 1e-9
    for entry in range(len(rank)):
        line = sorted(
            r
            for r in family.ranks()
            if r[:entry] + r[entry + 1 :] == rank[:entry] + rank[entry + 1 :]
        )
        losses = [family.loss(r) for r in line]
        assert all(more <= less + 1e-12 for less, more in pairwise(losses))
    assert family.loss(full_rank(family)) == pytest.approx(0, abs=reachable(name, 1e-9))


@several
@given(st.sampled_from(sorted(KERNEL_METHODS.keys() - APPROXIMATE)), st.data(), seeds)
def test_a_layer_of_exactly_this_rank_is_recovered(name, data, seed) -> None:
    layer, _ = data.draw(layers(torch.float64, channels=st.integers(2, 8)))
    method = applicable(name, layer)
    rank = data.draw(st.sampled_from(list(method.fit(layer, WEIGHT_METRIC).ranks())))
    form = with_random_factors(method.fit(layer, WEIGHT_METRIC).build(rank), seed)
    exact = form.to_dense()
    family = method.fit(exact, WEIGHT_METRIC)
    if name in APPROACHED and rank != full_rank(family):
        assert weight_error(family.build(rank), exact) ** 2 <= family.loss(rank) + 1e-9 < 0.9
        return
    assert family.loss(rank) < 1e-9
    assert weight_error(family.build(rank), exact) < 1e-6


@several
@given(methods, st.data())
def test_costs_are_those_of_the_closed_formulas(name, data) -> None:
    layer, shape = data.draw(layers(channels=st.integers(1, 12)))
    method = applicable(name, layer)
    rank = data.draw(st.sampled_from(list(method.fit(layer, WEIGHT_METRIC).ranks())))
    skeleton = method.skeleton(layer, rank)
    made = layer(torch.zeros(shape)).shape
    counted = count_parameters(skeleton), count_layer_macs(skeleton, [shape])
    if name in NETWORKS and isinstance(layer, nn.Linear):
        parameters, macs = network_cost(name, layer, *rank, made.numel() // layer.out_features)
        assert counted[0] == parameters and counted[1] in macs
    else:
        assert counted == cost_by_hand(name, layer, rank, torch.Size(shape), made)
    dense = copy.deepcopy(layer).to("meta")
    if is_transposed(layer):
        positions = torch.Size(shape).numel() // in_channels(layer)
    else:
        positions = made.numel() // layer.weight.shape[0]
    assert count_layer_macs(dense, [shape]) == layer.weight.numel() * positions


def is_frozen(method: Reduced, layer: nn.Module, form: nn.Module, factor: nn.Module) -> bool:
    """Whether the factor is the given one: the first, of an adjoint the last."""
    return method.name in FROZEN and factor is factors_of(form)[-1 if is_transposed(layer) else 0]


@pytest.mark.parametrize(("method", "layer"), CASES)
def test_every_factor_gets_a_gradient_and_the_bias_is_kept(method, layer) -> None:
    family = fitted(method, layer)
    form = family.build(family.ranks()[0])
    shape = (2, in_channels(layer), *(6 for _ in layer.weight.shape[2:]))
    form(torch.randn(shape)).square().sum().backward()
    for factor in factors_of(form):
        if not is_frozen(method, layer, form, factor):
            assert torch.isfinite(factor.weight.grad).all() and factor.weight.grad.abs().sum() > 0
        else:
            assert not factor.weight.requires_grad and factor.weight.grad is None
    assert all(factor.bias is None for factor in factors_of(form)[:-1])
    biases = biases_of(form)
    assert len(biases) == (layer.bias is not None)
    for bias in biases:
        assert torch.equal(form.to_dense().bias, layer.bias) and bias is not layer.bias


@pytest.mark.parametrize(("method", "layer"), CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_mode_and_gradients_are_those_of_the_layer(method, layer, dtype) -> None:
    layer = copy.deepcopy(layer).to(dtype).eval()
    layer.weight.requires_grad_(False)
    family = method.fit(layer, WEIGHT_METRIC)
    form = family.build(full_rank(family))
    assert {parameter.dtype for parameter in form.parameters()} == {dtype}
    assert not any(module.training for module in form.modules())
    assert not any(factor.weight.requires_grad for factor in factors_of(form))
    rounding = {torch.float16: 5e-3, torch.bfloat16: 4e-2, torch.float64: 1e-12}
    assert weight_error(form, layer) < reachable(method.name, rounding[dtype])


GEOMETRIES = [
    {"stride": (2, 1)},
    {"padding": "valid", "dilation": (1, 2)},
    *(
        {"padding": padding, "padding_mode": mode}
        for padding in ("same", (2, 0))
        for mode in ("zeros", "reflect", "replicate", "circular")
    ),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("name", CONVOLUTION_METHODS)
def test_every_geometry_in_every_precision(name, geometry, dtype) -> None:
    layer = nn.Conv2d(16, 12, (3, 2), dtype=dtype, **geometry)
    family = METHODS[name]().fit(layer, WEIGHT_METRIC)
    form = family.build(full_rank(family))
    inputs = torch.randn(2, 16, 7, 6, dtype=dtype)
    rounding = {torch.float16: 5e-3, torch.bfloat16: 4e-2, **TOLERANCE}
    with torch.no_grad():
        assert relative(form(inputs), layer(inputs)) < reachable(name, rounding[dtype])
    assert repr(form.to_dense()) == repr(layer)


@pytest.mark.parametrize(("method", "layer"), CASES)
def test_a_bias_may_be_frozen_alone_and_no_memory_is_shared(method, layer) -> None:
    layer = copy.deepcopy(layer).train()
    if layer.bias is not None:
        layer.bias.requires_grad_(False)
    family = method.fit(layer, WEIGHT_METRIC)
    form = family.build(full_rank(family))
    before = copy.deepcopy(form.state_dict())
    assert all(module.training for module in form.modules())
    for factor in factors_of(form):
        assert factor.weight.requires_grad != is_frozen(method, layer, form, factor)
        assert factor.bias is None or not factor.bias.requires_grad
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], value) for name, value in form.state_dict().items())


@pytest.mark.parametrize(("method", "layer"), CASES)
def test_the_state_of_a_form_is_loaded_into_its_skeleton(method, layer) -> None:
    family = fitted(method, layer)
    rank = family.ranks()[0]
    form, other = family.build(rank).eval(), method.skeleton(layer, rank).to_empty(device="cpu")
    other.eval()
    other.load_state_dict(form.state_dict())
    assert all(torch.equal(other.state_dict()[n], value) for n, value in form.state_dict().items())
    given = torch.randn(2, in_channels(layer), *(6 for _ in layer.weight.shape[2:]))
    torch.testing.assert_close(other(given), form(given))


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        (name, layer)
        for name, method in KERNEL_METHODS.items()
        for layer in KERNELS
        if method().why_not(layer) is None
    ],
    ids=str,
)
def test_the_form_is_exported(name, layer) -> None:
    method = METHODS[name]()
    family = method.fit(layer, WEIGHT_METRIC)
    form = family.build(family.ranks()[0]).eval()
    given = torch.randn(2, in_channels(layer), *(6 for _ in layer.weight.shape[2:]))
    exported = torch.export.export(form, (given,)).module()
    torch.testing.assert_close(exported(given), form(given))


@pytest.mark.parametrize(("method", "layer"), CASES)
def test_impossible_ranks_are_refused(method, layer) -> None:
    family = fitted(method, layer)
    best = full_rank(family)
    wrong = [
        (*best[:e], value, *best[e + 1 :]) for e in range(len(best)) for value in (0, best[e] + 1)
    ]
    for rank in [*wrong, (), (*best, 1)]:
        with pytest.raises(RankError):
            method.skeleton(layer, rank)
        with pytest.raises(RankError):
            family.build(rank)


@pytest.mark.parametrize("name", KERNEL_METHODS)
def test_impossible_ranks_have_no_loss(name) -> None:
    layer = nn.Conv2d(16, 24, 3) if name in CONVOLUTION_METHODS else nn.Linear(40, 24)
    family = METHODS[name]().fit(layer, WEIGHT_METRIC)
    best = full_rank(family)
    below, above = (0, *best[1:]), (*best[:-1], best[-1] + 1)
    for rank in (below, tuple(-entry for entry in best), above, (), (*best, 1)):
        with pytest.raises(RankError):
            family.loss(rank)


@pytest.mark.parametrize(("method", "layer"), CASES)
def test_candidates_are_aligned(method, layer) -> None:
    ranks = fitted(method, layer).ranks()
    assert len(set(ranks)) == len(ranks)
    if method.name in COUNTED:
        assert list(ranks[:-1]) == [(rank,) for rank in range(1, len(ranks))]
        return
    for entry in zip(*ranks, strict=True):
        together = max(1, method.method.alignment // groups_of(layer))
        assert all(r % together == 0 or r == max(entry) for r in entry)


def unfoldings(method: str, weight: torch.Tensor) -> list[torch.Tensor]:
    """What each entry of a rank truncates, of a weight (out, in, *kernel)."""
    by_mode = [weight.movedim(mode, 0).flatten(1) for mode in (0, 1)]
    if method.startswith("separable"):
        split = weight.permute(1, 2, 0, *range(3, weight.dim())).flatten(0, 1).flatten(1)
        return [split, by_mode[0]]
    if method == "tensor-train":
        lengths = [length for length in weight.shape[2:] if length > 1]
        train = weight.movedim(0, -1).reshape(weight.shape[1], *lengths, -1)
        return [train.flatten(0, bond).flatten(1) for bond in range(train.dim() - 1)]
    return by_mode


@pytest.mark.parametrize(("method", "layer"), CASES)
def test_spectra_are_the_singular_values_of_the_unfoldings(method, layer) -> None:
    spectra = fitted(method, layer).spectra
    by_group = layer.weight.detach().double().chunk(groups_of(layer))
    expected = zip(*(unfoldings(method.name, weight) for weight in by_group), strict=True)
    for spectrum, of_groups in zip(spectra, expected, strict=False):
        assert spectrum.shape == tuple(of_groups[0].shape)
        squares = torch.stack([torch.linalg.svdvals(one).square() for one in of_groups])
        torch.testing.assert_close(
            spectrum.singular_values, squares.mean(0).sqrt(), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(("method", "layer"), CASES)
def test_weights_that_cannot_be_are_refused_and_zeros_are_not(method, layer) -> None:
    layer = copy.deepcopy(layer)
    with torch.no_grad():
        layer.weight.zero_()
        family = method.fit(layer, WEIGHT_METRIC)
        assert family.loss(family.ranks()[0]) == pytest.approx(0)
        assert weight_error(family.build(family.ranks()[0]), layer) == 0
        layer.weight.view(-1)[3] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        method.fit(layer, WEIGHT_METRIC)


@pytest.mark.parametrize("name", METHODS)
def test_settings_survive_json(name) -> None:
    method = METHODS[name](alignment=4)
    settings = json.loads(json.dumps(dataclasses.asdict(method)))
    assert METHODS[name](**settings) == method
    assert METHODS[name].name == name


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("alignment", [0, -8, 2.0, "8", True])
def test_senseless_alignments_are_refused(name, alignment) -> None:
    with pytest.raises(ValueError, match="integer of at least 1"):
        METHODS[name](alignment=alignment)


def in_a_metric(layer: nn.Module, inputs: str, gradients: bool, rank: int | None = None):
    """The layer in float64 with weights of its own, and a metric; `rank` of singular moments."""
    layer = copy.deepcopy(layer).double()
    groups = groups_of(layer)
    outputs, channels = layer.weight.shape[0] // groups, layer.weight.shape[1]
    length = {"patches": layer.weight[0].numel(), "channels": channels}
    with torch.no_grad():
        layer.weight.copy_(tensor_of(layer.weight.shape, seed=1))

    def moment(size: int, seed: int) -> torch.Tensor:
        of_groups = [weight_of(size, seed=seed + 10 * g, rank=rank) for g in range(groups)]
        return of_groups[0] if groups == 1 else torch.stack(of_groups)

    if is_transposed(layer):  # of which the outputs' channels come second in the weight
        outputs, length = channels, dict.fromkeys(length, outputs)
    return layer, Moments(
        moment(length[inputs], seed=2) if inputs else None,
        moment(outputs, seed=3) if gradients else None,
    )


def squared_error(moments: Moments, layer: nn.Module, difference: torch.Tensor) -> float:
    """tr(G Δ A Δᵀ), summed over groups."""
    groups = groups_of(layer)
    total = 0.0
    for g, one in enumerate(difference.chunk(groups)):
        inputs, gradients = (
            moment if moment is None or groups == 1 else moment[g]
            for moment in (moments.inputs, moments.gradients)
        )
        if is_transposed(layer):
            one = one.transpose(0, 1)
        total += Moments(inputs, gradients).squared_error(one)
    return total


def metric_error(moments: Moments, form: nn.Module, layer: nn.Module) -> float:
    """Squared, relative to the weight's."""
    weight = layer.weight.detach()
    difference = form.to_dense().weight.detach() - weight
    return squared_error(moments, layer, difference) / squared_error(moments, layer, weight)


def whitened(weight: torch.Tensor, moments: Moments) -> torch.Tensor:
    """The weight, unfolded, in coordinates in which all errors count the same."""
    flat = weight.flatten(1)
    if moments.inputs is not None:
        places = flat.shape[1] // len(moments.inputs)
        root = torch.linalg.cholesky(moments.inputs).contiguous()
        flat = flat @ torch.kron(root, torch.eye(places, dtype=flat.dtype))
    if moments.gradients is not None:
        flat = torch.linalg.cholesky(moments.gradients).mT @ flat
    return flat


@pytest.mark.parametrize(("method", "layer", "inputs", "gradients"), IN_A_METRIC)
def test_in_a_metric_full_rank_is_still_the_dense_layer(method, layer, inputs, gradients) -> None:
    layer, moments, family = fitted_in_a_metric(method, layer, inputs, gradients)
    best = full_rank(family)
    assert metric_error(moments, family.build(best), layer) < reachable(method.name, 1e-9)
    if method.name not in INEXACT:
        assert weight_error(family.build(best), layer) < 1e-6
        assert family.loss(best) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("inputs", "gradients"), KNOWN)
@pytest.mark.parametrize(
    "layer",
    [one for one in EXAMPLES if groups_of(one) == 1 and not is_transposed(one)],
    ids=str,
)
def test_svd_loses_the_tail_of_the_whitened_weight(layer, inputs, gradients) -> None:
    """Eckart and Young: no layer of this rank is nearer in the metric."""
    layer, moments = in_a_metric(layer, inputs, gradients)
    family = METHODS["svd"]().fit(layer, moments)
    squares = torch.linalg.svdvals(whitened(layer.weight.detach(), moments)).square()
    for (rank,) in family.ranks():
        tail = (squares[rank:].sum() / squares.sum()).item()
        assert family.loss((rank,)) == pytest.approx(tail, rel=1e-6, abs=1e-9)
        error = metric_error(moments, family.build((rank,)), layer)
        assert error == pytest.approx(tail, rel=1e-6, abs=1e-9)
    (spectrum,) = family.spectra
    torch.testing.assert_close(spectrum.singular_values.square(), squares, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("method", "layer"), CASES)
def test_a_scale_is_the_unit_of_the_loss(method, layer) -> None:
    layer, moments, relative_family = fitted_in_a_metric(method, layer, "patches", True)
    family = method.fit(layer, dataclasses.replace(moments, scale=3.0))
    whole = squared_error(moments, layer, layer.weight.detach())
    for rank in family.ranks():
        expected = 3 * whole * relative_family.loss(rank)
        assert family.loss(rank) == pytest.approx(expected, rel=1e-9, abs=1e-9 * whole)


@pytest.mark.parametrize(("method", "layer", "inputs", "gradients"), IN_A_METRIC)
def test_a_metric_is_served_better_by_what_is_fitted_in_it(
    method, layer, inputs, gradients
) -> None:
    """Than by what is fitted to the weight alone; alternation finds a local optimum."""
    layer, moments, family = fitted_in_a_metric(method, layer, inputs, gradients)
    plain = fitted(method, layer)
    slack = 1.02 if method.name in ALTERNATING else 1 + 1e-6
    errors, others = [], []
    exact = method.name in APPROXIMATE  # at the last rank, where both are
    for rank in tried_ranks(method, family)[: -1 if exact else None]:
        errors.append(metric_error(moments, family.build(rank), layer))
        others.append(metric_error(moments, plain.build(rank), layer))
        assert errors[-1] <= slack * others[-1] + 1e-9
    if method.name in FROZEN and (inputs != "patches" or is_transposed(layer)):
        # The mixture of orthonormal filters is best for each place by itself.
        assert sum(errors) == pytest.approx(sum(others), rel=1e-9)
    else:
        assert sum(errors) < sum(others) or method.name in LOSSLESS


@pytest.mark.parametrize(("method", "layer", "inputs", "gradients"), IN_A_METRIC)
def test_in_a_metric_the_loss_does_not_grow_with_rank(method, layer, inputs, gradients) -> None:
    _, _, family = fitted_in_a_metric(method, layer, inputs, gradients)
    losses = {rank: family.loss(rank) for rank in family.ranks()}
    for less, more in product(losses, repeat=2):
        if all(a <= b for a, b in zip(less, more, strict=True)):
            assert losses[more] <= losses[less] + 1e-12
    saves = count_parameters(method.skeleton(layer, min(losses))) < count_parameters(layer)
    exact = method.name in LOSSLESS or (method.name in WIDE and not saves)
    assert losses[min(losses)] > 1e-3 or exact
    assert losses[max(losses)] < reachable(method.name, 1e-3)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("layer", [nn.Conv1d(16, 24, 3), nn.Conv3d(16, 24, 2)], ids=str)
@pytest.mark.parametrize(
    "entry",
    [
        "outputs",
        "inputs",
    ],
)
def test_where_tucker2_cuts_one_mode_its_loss_is_the_error(layer, entry, gradients) -> None:
    """In the metric of patches, which does not fit a form that keeps the kernel's places apart."""
    layer, moments = in_a_metric(layer, "patches", gradients)
    family = METHODS["tucker2"]().fit(layer, moments)
    for rank in [(8, 16), (16, 16)] if entry == "outputs" else [(24, 8)]:
        error = metric_error(moments, family.build(rank), layer)
        assert family.loss(rank) == pytest.approx(error, rel=1e-6)


@pytest.mark.parametrize("layer", [nn.Conv1d(16, 24, 3), nn.Conv2d(20, 17, (3, 2))], ids=str)
@pytest.mark.parametrize("gradients", [True, False])
def test_the_core_of_tucker2_is_best_in_the_metric_of_patches(layer, gradients) -> None:
    layer, moments = in_a_metric(layer, "patches", gradients)
    weight = layer.weight.detach()
    form = METHODS["tucker2"]().fit(layer, moments).build((8, 8))
    core = form[1].weight

    def error() -> float:
        return moments.squared_error(form.to_dense().weight.detach() - weight)

    least = error()
    # The error is quadratic in the core: at its least, steps to both sides cost the same.
    for seed in range(20):
        step = tensor_of(core.shape, seed=seed)
        step *= 0.1 * core.detach().norm() / step.norm()
        with torch.no_grad():
            core.add_(step)
            ahead = error()
            core.sub_(2 * step)
            behind = error()
            core.add_(step)
        assert min(ahead, behind) > least
        assert ahead - least == pytest.approx(behind - least, rel=1e-4)


@pytest.mark.parametrize(("method", "layer", "inputs", "gradients"), IN_A_METRIC)
def test_singular_moments_give_finite_factors(method, layer, inputs, gradients) -> None:
    """All inputs along one direction; two outputs, and all gradients but along one direction, 0."""
    layer, moments = in_a_metric(layer, inputs, gradients, rank=1)
    if moments.gradients is not None:
        for direction in (moments.gradients, moments.gradients.mT):
            direction[..., [0, 2], :] = 0
    family = method.fit(layer, moments)
    for rank in tried_ranks(method, family):
        form = family.build(rank)
        assert all(torch.isfinite(parameter).all() for parameter in form.parameters())
        most = reachable(method.name, 1e-6) if rank == full_rank(family) else 1 + 1e-6
        assert abs(metric_error(moments, form, layer)) < most
        assert 0 <= family.loss(rank) <= most


@pytest.mark.parametrize(("method", "layer", "inputs", "gradients"), IN_A_METRIC)
def test_at_full_rank_singular_moments_change_nothing(
    request, method, layer, inputs, gradients
) -> None:
    """Also along directions that no input of the calibration data took."""
    layer, moments = in_a_metric(layer, inputs, gradients, rank=2)
    family = method.fit(layer, moments)
    form = family.build(full_rank(family))
    if method.name in LOSSLESS | INEXACT:
        assert metric_error(moments, form, layer) < reachable(method.name, 1e-6)
        return
    # Moments are singular but for a floor of 1e-10: half of float64's digits are lost.
    assert weight_error(form, layer) < 2e-4


@pytest.mark.parametrize(("method", "layer"), CASES)
def test_moments_of_nothing_give_finite_factors(method, layer) -> None:
    layer, moments = in_a_metric(layer, "patches", True)
    nothing = Moments(torch.zeros_like(moments.inputs), torch.zeros_like(moments.gradients))
    of_one_side = [Moments(nothing.inputs), Moments(gradients=nothing.gradients)]
    for known in (nothing, *(of_one_side if method.name not in APPROXIMATE else ())):
        family = method.fit(layer, known)
        for rank in tried_ranks(method, family)[:2]:
            form = family.build(rank)
            assert all(torch.isfinite(parameter).all() for parameter in form.parameters())
            assert family.loss(rank) == 0


@pytest.mark.parametrize(("method", "layer", "inputs", "gradients"), IN_A_METRIC)
def test_weights_that_cannot_be_are_refused_in_a_metric_too(
    method, layer, inputs, gradients
) -> None:
    layer, moments = in_a_metric(layer, inputs, gradients)
    with torch.no_grad():
        layer.weight.view(-1)[3] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        method.fit(layer, moments)


@pytest.mark.parametrize(("method", "layer"), CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_metric_serves_every_precision(method, layer, dtype) -> None:
    double, moments, in_double = fitted_in_a_metric(method, layer, "patches", True)
    layer = copy.deepcopy(double).to(dtype)
    family = method.fit(layer, moments)
    rounding = {torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float32: 1e-4}
    form = family.build(full_rank(family))
    assert {parameter.dtype for parameter in form.parameters()} == {dtype}
    if method.name in INEXACT:
        assert metric_error(moments, form, layer) < 1
    else:
        assert weight_error(form, layer) < rounding[dtype]
    # A search may take another turn after rounding.
    least = 1e-2 if method.name in APPROACHED | APPROXIMATE else 1e-3
    for rank in family.ranks():
        assert family.loss(rank) == pytest.approx(
            in_double.loss(rank), rel=rounding[dtype], abs=least
        )


@pytest.mark.parametrize("name", KERNEL_METHODS)
def test_every_method_has_a_layer_in_these_tests(name) -> None:
    assert any(case.values[0].name == name for case in CASES)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.Conv2d(32, 32, 3, groups=32), "grouped convolution, groups=32: depthwise"),
        (nn.ConvTranspose2d(32, 64, 3, groups=32), "transposed convolution, groups=32: depthwise"),
        (nn.LSTM(32, 32), "no factorization for LSTM layers"),
        (nn.Bilinear(4, 4, 4), "no factorization for Bilinear layers"),
        (nn.MultiheadAttention(8, 2).out_proj, "NonDynamicallyQuantizableLinear"),
    ],
)
def test_layers_that_no_method_takes_and_why(layer, words) -> None:
    for method in KERNEL_METHODS.values():
        assert words in reduction.why_not(method(), layer)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("name", METHODS)
def test_layers_without_a_weight_to_factorize_are_refused(name) -> None:
    for layer in (nn.Linear(0, 12), nn.Linear(12, 0), nn.Conv2d(32, 0, 3)):
        assert METHODS[name]().why_not(layer) is not None


def test_tucker2_leaves_to_svd_what_svd_does_better() -> None:
    tucker2 = METHODS["tucker2"]()
    assert "svd serves it" in tucker2.why_not(nn.Conv2d(64, 64, 1))
    assert "only 3 input channels" in tucker2.why_not(nn.Conv2d(3, 64, 3))
    assert tucker2.why_not(nn.Conv2d(64, 64, 3)) is None


def test_aligned_ranks() -> None:
    assert list(aligned_ranks(30, 8)) == [8, 16, 24, 30]
    assert list(aligned_ranks(32, 8)) == [8, 16, 24, 32]
    assert list(aligned_ranks(5, 8)) == [5]
    assert list(aligned_ranks(3, 1)) == [1, 2, 3]
