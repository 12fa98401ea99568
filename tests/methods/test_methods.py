"""The laws that every method keeps, run over the table `METHODS`."""

import copy
import dataclasses
import json
from itertools import pairwise

import pytest
import torch
from geometry import layers, relative
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from rankfold.cost import count_layer_macs, count_parameters
from rankfold.errors import RankError
from rankfold.layers import assign_factors
from rankfold.methods import METHODS, WEIGHT_METRIC, Method, Moments, aligned_ranks

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
methods = st.sampled_from(sorted(METHODS))
seeds = st.integers(0, 1000)
several = settings(max_examples=100, suppress_health_check=[HealthCheck.filter_too_much])

EXAMPLES = [
    nn.Linear(40, 24),
    nn.Linear(24, 40, bias=False),
    nn.Conv1d(16, 24, 3, stride=2, padding=1),
    nn.Conv2d(16, 24, (3, 1), stride=(2, 1), padding=(1, 0), bias=False),
    nn.Conv2d(20, 17, 3, padding="same", dilation=2, padding_mode="reflect"),
    nn.Conv2d(3, 32, 5),
    nn.Conv2d(32, 24, 1),
    nn.Conv3d(16, 16, 2, padding_mode="circular", padding=1),
]
CASES = [
    pytest.param(method(), layer, id=f"{name}-{layer}")
    for name, method in METHODS.items()
    for layer in EXAMPLES
    if method().why_not(layer) is None
]


def applicable(name: str, layer: nn.Module) -> Method:
    method = METHODS[name](alignment=1)
    assume(method.why_not(layer) is None)
    return method


def full_rank(family) -> tuple[int, ...]:
    return max(family.ranks())


def weight_error(form, layer) -> float:
    return relative(form.to_dense().weight.detach(), layer.weight.detach())


@several
@given(methods, st.data(), st.sampled_from(list(TOLERANCE)), seeds)
def test_at_full_rank_nothing_changes(name, data, dtype, seed) -> None:
    layer, shape = data.draw(layers(dtype))
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
        assert difference <= TOLERANCE[dtype] * terms(inputs.abs()).norm()


@several
@given(methods, st.data(), seeds)
def test_the_form_is_the_dense_layer_that_it_represents(name, data, seed) -> None:
    """For random factors, and in every geometry."""
    layer, shape = data.draw(layers(torch.float64))
    method = applicable(name, layer)
    rank = data.draw(st.sampled_from(list(method.fit(layer, WEIGHT_METRIC).ranks())))
    form = method.skeleton(layer, rank)
    assert all(parameter.is_meta for parameter in form.parameters())
    generator = torch.Generator().manual_seed(seed)
    factors = [
        torch.randn(factor.weight.shape, dtype=torch.float64, generator=generator)
        for factor in form
    ]
    assign_factors(form, factors, layer)
    dense = form.to_dense()
    assert repr(dense) == repr(layer) and type(dense) is type(layer)
    inputs = torch.randn(shape, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        assert relative(form(inputs), dense(inputs)) < 1e-10


@several
@given(methods, st.data())
def test_skeleton_and_fitted_layer_agree(name, data) -> None:
    layer, _ = data.draw(layers())
    method = applicable(name, layer)
    family = method.fit(layer, WEIGHT_METRIC)
    rank = data.draw(st.sampled_from(list(family.ranks())))
    skeleton, form = method.skeleton(layer, rank), family.build(rank)
    assert {n: v.shape for n, v in skeleton.state_dict().items()} == {
        n: v.shape for n, v in form.state_dict().items()
    }
    assert repr(skeleton) == repr(form)


@several
@given(methods, st.data())
def test_the_loss_is_the_error_and_does_not_grow_with_rank(name, data) -> None:
    layer, _ = data.draw(layers(torch.float64, channels=st.integers(2, 12)))
    family = applicable(name, layer).fit(layer, WEIGHT_METRIC)
    rank = data.draw(st.sampled_from(list(family.ranks())))
    error = weight_error(family.build(rank), layer) ** 2
    if name == "svd":
        assert family.loss(rank) == pytest.approx(error, abs=1e-9)
    assert error <= family.loss(rank) + 1e-9
    for entry in range(len(rank)):
        line = sorted(
            r
            for r in family.ranks()
            if r[:entry] + r[entry + 1 :] == rank[:entry] + rank[entry + 1 :]
        )
        losses = [family.loss(r) for r in line]
        assert all(more <= less + 1e-12 for less, more in pairwise(losses))
    assert family.loss(full_rank(family)) == pytest.approx(0, abs=1e-9)


@several
@given(methods, st.data(), seeds)
def test_a_layer_of_exactly_this_rank_is_recovered(name, data, seed) -> None:
    layer, _ = data.draw(layers(torch.float64, channels=st.integers(2, 12)))
    method = applicable(name, layer)
    rank = data.draw(st.sampled_from(list(method.fit(layer, WEIGHT_METRIC).ranks())))
    form = method.skeleton(layer, rank)
    generator = torch.Generator().manual_seed(seed)
    assign_factors(
        form,
        [torch.randn(f.weight.shape, dtype=torch.float64, generator=generator) for f in form],
        layer,
    )
    exact = form.to_dense()
    family = method.fit(exact, WEIGHT_METRIC)
    assert family.loss(rank) < 1e-9
    assert weight_error(family.build(rank), exact) < 1e-6


def closed_form_cost(method: str, layer: nn.Module, rank, positions_in, positions_out):
    """Parameters and MACs by hand: Kim et al. 2016, equations 4 to 7, and the two-factor form."""
    bias = 0 if layer.bias is None else layer.weight.shape[0]
    outputs, inputs = layer.weight.shape[:2]
    kernel = layer.weight[0, 0].numel()
    if method == "svd":
        (r,) = rank
        parameters = r * (inputs * kernel + outputs)
        return parameters + bias, parameters * positions_out
    r_out, r_in = rank
    parameters = inputs * r_in + r_in * r_out * kernel + r_out * outputs
    macs = inputs * r_in * positions_in + (r_in * r_out * kernel + r_out * outputs) * positions_out
    return parameters + bias, macs


@several
@given(methods, st.data())
def test_costs_are_those_of_the_closed_formulas(name, data) -> None:
    layer, shape = data.draw(layers())
    method = applicable(name, layer)
    rank = data.draw(st.sampled_from(list(method.fit(layer, WEIGHT_METRIC).ranks())))
    skeleton = method.skeleton(layer, rank)
    outputs = layer(torch.zeros(shape)).numel() // layer.weight.shape[0]
    inputs = torch.Size(shape).numel() // layer.weight.shape[1]
    counted = count_parameters(skeleton), count_layer_macs(skeleton, [shape])
    assert counted == closed_form_cost(name, layer, rank, inputs, outputs)
    dense = copy.deepcopy(layer).to("meta")
    assert count_layer_macs(dense, [shape]) == layer.weight.numel() * outputs


@pytest.mark.parametrize(("method", "layer"), CASES)
def test_every_factor_gets_a_gradient_and_the_bias_is_kept(method, layer) -> None:
    family = method.fit(layer, WEIGHT_METRIC)
    form = family.build(family.ranks()[0])
    shape = (2, layer.weight.shape[1], *(6 for _ in layer.weight.shape[2:]))
    form(torch.randn(shape)).square().sum().backward()
    for factor in form:
        assert torch.isfinite(factor.weight.grad).all() and factor.weight.grad.abs().sum() > 0
        assert (factor.bias is not None) == (factor is form[-1] and layer.bias is not None)
    if layer.bias is not None:
        assert torch.equal(form[-1].bias, layer.bias) and form[-1].bias is not layer.bias


@pytest.mark.parametrize(("method", "layer"), CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_mode_and_gradients_are_those_of_the_layer(method, layer, dtype) -> None:
    layer = copy.deepcopy(layer).to(dtype).eval()
    layer.weight.requires_grad_(False)
    family = method.fit(layer, WEIGHT_METRIC)
    form = family.build(full_rank(family))
    assert {parameter.dtype for parameter in form.parameters()} == {dtype}
    assert not any(module.training for module in form.modules())
    assert not any(factor.weight.requires_grad for factor in form)
    rounding = {torch.float16: 5e-3, torch.bfloat16: 4e-2, torch.float64: 1e-12}
    assert weight_error(form, layer) < rounding[dtype]


GEOMETRIES = [
    {"stride": (2, 1)},
    {"padding": "valid", "dilation": (1, 2)},
    *(
        {"padding": padding, "padding_mode": mode}
        for padding in ("same", (2, 0))
        for mode in ("zeros", "reflect", "replicate", "circular")
    ),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_every_geometry_in_every_precision(name, geometry, dtype) -> None:
    layer = nn.Conv2d(16, 12, (3, 2), dtype=dtype, **geometry)
    family = METHODS[name]().fit(layer, WEIGHT_METRIC)
    form = family.build(full_rank(family))
    inputs = torch.randn(2, 16, 7, 6, dtype=dtype)
    rounding = {torch.float16: 5e-3, torch.bfloat16: 4e-2, **TOLERANCE}
    with torch.no_grad():
        assert relative(form(inputs), layer(inputs)) < rounding[dtype]
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
    for name, parameter in form.named_parameters():
        assert parameter.requires_grad == name.endswith("weight")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], value) for name, value in form.state_dict().items())


@pytest.mark.parametrize(("method", "layer"), CASES)
def test_impossible_ranks_are_refused(method, layer) -> None:
    family = method.fit(layer, WEIGHT_METRIC)
    best = full_rank(family)
    wrong = [
        (*best[:e], value, *best[e + 1 :]) for e in range(len(best)) for value in (0, best[e] + 1)
    ]
    for rank in [*wrong, (), (*best, 1)]:
        with pytest.raises(RankError):
            method.skeleton(layer, rank)
        with pytest.raises(RankError):
            family.build(rank)


@pytest.mark.parametrize("name", METHODS)
def test_impossible_ranks_have_no_loss(name) -> None:
    family = METHODS[name]().fit(nn.Conv2d(16, 24, 3), WEIGHT_METRIC)
    best = full_rank(family)
    below, above = (0, *best[1:]), (*best[:-1], best[-1] + 1)
    for rank in (below, tuple(-entry for entry in best), above, (), (*best, 1)):
        with pytest.raises(RankError):
            family.loss(rank)


@pytest.mark.parametrize(("method", "layer"), CASES)
def test_candidates_are_aligned(method, layer) -> None:
    ranks = method.fit(layer, WEIGHT_METRIC).ranks()
    assert len(set(ranks)) == len(ranks)
    for entry in zip(*ranks, strict=True):
        assert all(r % method.alignment == 0 or r == max(entry) for r in entry)


@pytest.mark.parametrize(("method", "layer"), CASES)
def test_spectra_are_the_singular_values_of_the_unfoldings(method, layer) -> None:
    spectra = method.fit(layer, WEIGHT_METRIC).spectra
    for mode, spectrum in enumerate(spectra):
        unfolding = layer.weight.detach().movedim(mode, 0).flatten(1)
        assert spectrum.shape == tuple(unfolding.shape)
        torch.testing.assert_close(
            spectrum.singular_values, torch.linalg.svdvals(unfolding.double()), rtol=1e-4, atol=1e-5
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


@pytest.mark.parametrize("name", METHODS)
def test_a_metric_that_is_not_there_yet_is_refused(name) -> None:
    with pytest.raises(NotImplementedError, match=name):
        METHODS[name]().fit(nn.Conv2d(16, 16, 3), Moments(inputs=torch.eye(16)))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_layer_in_these_tests(name) -> None:
    assert any(case.values[0].name == name for case in CASES)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.Conv2d(32, 32, 3, groups=4), "grouped convolution, groups=4"),
        (nn.Conv2d(32, 32, 3, groups=32), "grouped convolution, groups=32"),
        (nn.ConvTranspose2d(32, 32, 3), "no factorization for ConvTranspose2d layers"),
        (nn.LSTM(32, 32), "no factorization for LSTM layers"),
        (nn.Bilinear(4, 4, 4), "no factorization for Bilinear layers"),
        (nn.MultiheadAttention(8, 2).out_proj, "NonDynamicallyQuantizableLinear"),
    ],
)
def test_layers_that_no_method_takes_and_why(layer, words) -> None:
    for method in METHODS.values():
        assert words in method().why_not(layer)


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
