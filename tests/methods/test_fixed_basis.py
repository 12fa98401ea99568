"""Filters known beforehand, and the best mixture of them."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import scipy.fft
import torch
from geometry import relative
from tensors import tensor_of, weight_of
from torch import nn

import rankfold as rf
from rankfold.cost import count_layer_macs, count_parameters
from rankfold.layers import FixedBasisConvolution
from rankfold.methods import WEIGHT_METRIC, FixedBasis, Moments
from rankfold.methods.fixed_basis import _haar, _wavelets, basis_functions

LAYERS = [
    (nn.Conv1d(5, 7, 4), "haar"),
    (nn.Conv2d(4, 6, 3), "dct"),
    (nn.Conv2d(4, 6, (4, 2), bias=False), "haar"),
    (nn.Conv3d(3, 5, (2, 3, 2)), "dct"),
    (nn.Conv2d(4, 6, (2, 4)), "db2"),
]


def with_weight(layer: nn.Module) -> nn.Module:
    layer = layer.double()
    with torch.no_grad():
        layer.weight.copy_(tensor_of(layer.weight.shape))
    return layer


@pytest.mark.parametrize(
    ("basis", "lengths"),
    [
        ("dct", (3, 3)),
        ("dct", (5,)),
        ("dct", (2, 3, 4)),
        ("haar", (4, 8)),
        ("db2", (4, 8)),
        ("sym4", (2, 16)),
        ("coif1", (8,)),
    ],
)
def test_functions_are_orthonormal_and_start_with_the_mean(basis, lengths) -> None:
    functions = basis_functions(basis, lengths).flatten(1)
    torch.testing.assert_close(functions @ functions.mT, torch.eye(len(functions)).double())
    torch.testing.assert_close(functions[0], functions[0, :1].expand_as(functions[0]))


def test_cosines_are_scipys_ordered_by_frequency() -> None:
    functions = basis_functions("dct", (3, 4))
    frequencies = [(0, 0), (0, 1), (1, 0), (0, 2), (1, 1), (2, 0), (0, 3), (1, 2), (2, 1)]
    for function, frequency in zip(functions, frequencies, strict=False):
        coefficients = np.zeros((3, 4))
        coefficients[frequency] = 1
        expected = scipy.fft.idctn(coefficients, norm="ortho")
        np.testing.assert_allclose(function, expected, atol=1e-12)


def test_haar_wavelets_by_hand() -> None:
    half = 0.5**0.5
    expected = [
        [0.5, 0.5, 0.5, 0.5],
        [0.5, 0.5, -0.5, -0.5],
        [half, -half, 0, 0],
        [0, 0, half, -half],
    ]
    torch.testing.assert_close(basis_functions("haar", (4,)), torch.tensor(expected).double())


def test_haar_wavelets_are_those_of_pywavelets_too() -> None:
    for length in (2, 4, 16):
        torch.testing.assert_close(_wavelets("haar", length), _haar(length))


def test_wavelets_with_two_vanishing_moments_do_not_see_a_slope() -> None:
    fine = basis_functions("db2", (16,))[8:]
    slope = torch.arange(16, dtype=torch.float64)
    unseen = (fine @ slope).abs() < 1e-10
    assert unseen.sum() == 6  # all but the two that go round
    assert ((_haar(16)[8:] @ slope).abs() > 0.1).all()


@pytest.mark.parametrize(("layer", "basis"), LAYERS, ids=str)
@pytest.mark.parametrize("inputs", ["", "channels", "patches"])
def test_the_mixture_is_best_and_its_error_is_the_loss(layer, basis, inputs) -> None:
    """Against least squares on what the filters make of samples with this moment."""
    layer = with_weight(layer)
    outputs, channels = layer.weight.shape[:2]
    weight = layer.weight.detach().flatten(2)
    places = weight.shape[2]
    roots = {
        "": torch.eye(channels * places).double(),
        "channels": torch.kron(weight_of(channels, seed=1), torch.eye(places)),
        "patches": weight_of(channels * places, seed=1),
    }[inputs]
    inputs_moment = {
        "": None,
        "channels": weight_of(channels, seed=1) @ weight_of(channels, seed=1),
        "patches": roots @ roots,
    }[inputs]
    moments = Moments(inputs_moment, weight_of(outputs, seed=2))
    family = FixedBasis(basis=basis).fit(layer, moments)
    functions = basis_functions(basis, layer.kernel_size).flatten(1)
    whole = moments.squared_error(layer.weight.detach())
    for rank in (1, 2, places - 1):
        samples = roots.reshape(-1, channels, places)  # their moment is roots squared
        features = torch.einsum("nip,mp->nim", samples, functions[:rank]).flatten(1)
        expected = torch.linalg.lstsq(features, roots @ weight.flatten(1).mT).solution.mT
        form = family.build((rank,))
        found = form[-1].weight.detach().flatten(1)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        difference = form.to_dense().weight.detach() - layer.weight.detach()
        error = moments.squared_error(difference) / whole
        assert family.loss((rank,)) == pytest.approx(error, rel=1e-6, abs=1e-9)


def test_in_the_weight_metric_the_mixture_is_the_transform() -> None:
    layer = with_weight(nn.Conv2d(2, 3, 4))
    form = FixedBasis().fit(layer, WEIGHT_METRIC).build((3,))
    coefficients = scipy.fft.dctn(layer.weight.detach().numpy(), norm="ortho", axes=(2, 3))
    expected = np.stack([coefficients[..., 0, 0], coefficients[..., 0, 1], coefficients[..., 1, 0]])
    found = form[-1].weight.detach().reshape(3, 2, 3).movedim(2, 0)
    np.testing.assert_allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(8, 16, 3), nn.Conv2d(8, 16, 3, groups=2), nn.ConvTranspose2d(8, 16, 3)],
    ids=str,
)
def test_the_basis_is_frozen_also_after_loading(tmp_path, layer) -> None:
    model = nn.Sequential(layer)
    data = [torch.randn(2, 8, 6, 6)]
    analysis = rf.analyze(model, data, methods=[FixedBasis()], metric="weight")
    small = rf.factorize(model, analysis.plan(macs=0.5))
    rf.save(small, tmp_path / "small")
    loaded = rf.load(tmp_path / "small", like=model)
    for network in (small, loaded):
        names = ["basis", "mixture"][:: -1 if isinstance(layer, nn.ConvTranspose2d) else 1]
        factors = dict(zip(names, network[0], strict=True))
        assert not factors["basis"].weight.requires_grad
        assert factors["mixture"].weight.requires_grad and network[0][-1].bias.requires_grad
    torch.testing.assert_close(loaded(data[0]), small(data[0]))


def test_the_geometry_goes_to_the_basis_and_the_bias_to_the_mixture() -> None:
    layer = nn.Conv2d(4, 6, (3, 5), stride=(2, 3), padding=(1, 4), dilation=(2, 1))
    form = FixedBasisConvolution(layer, basis_functions("dct", (3, 5))[:2])
    assert repr(form[0]) == (
        "Conv2d(4, 8, kernel_size=(3, 5), stride=(2, 3), padding=(1, 4), dilation=(2, 1), "
        "groups=4, bias=False)"
    )
    assert repr(form[1]) == "Conv2d(8, 6, kernel_size=(1, 1), stride=(1, 1))"
    torch.testing.assert_close(
        form[0].weight.unflatten(0, (4, 2))[3, :, 0], basis_functions("dct", (3, 5))[:2].float()
    )


@pytest.mark.parametrize(
    ("layer", "basis", "words"),
    [
        (nn.Conv2d(4, 4, 1), "dct", "a kernel of 1x1 has no spatial modes"),
        (nn.Conv2d(4, 4, (2, 3)), "haar", "a kernel of 2x3: the basis haar takes lengths"),
        (nn.Linear(4, 4), "dct", "no factorization for Linear layers"),
    ],
)
def test_layers_without_such_a_basis_and_why(layer, basis, words) -> None:
    assert words in FixedBasis(basis=basis).why_not(layer)


def test_the_basis_is_a_setting() -> None:
    method = FixedBasis(basis="haar")
    assert FixedBasis(**json.loads(json.dumps(asdict(method)))) == method
    with pytest.raises(ValueError, match="the bases are dct, haar and PyWavelets'"):
        FixedBasis(basis="fourier")
    with pytest.raises(ValueError, match=r"bior2\.2 is not orthogonal"):
        FixedBasis(basis="bior2.2")


def test_other_wavelets_than_haars_need_pywavelets(monkeypatch) -> None:
    monkeypatch.setattr("rankfold.methods.fixed_basis.pywt", None)
    FixedBasis(basis="haar")
    with pytest.raises(ValueError, match=r"pip install 'rankfold\[wavelets\]'"):
        FixedBasis(basis="db2")


def test_costs_by_hand() -> None:
    layer = nn.Conv2d(64, 128, 3, padding=1)
    form = FixedBasisConvolution(layer, torch.empty(3, 3, 3, device="meta"), device="meta")
    parameters = 64 * 3 * 9 + 64 * 3 * 128
    assert count_parameters(form) == parameters + 128
    assert count_layer_macs(form, [(1, 64, 10, 10)]) == parameters * 100


def test_exports_and_round_trips_like_any_module() -> None:
    layer = nn.Conv2d(8, 16, 3, padding=1)
    form = FixedBasis().fit(layer, WEIGHT_METRIC).build((3,)).eval()
    given = torch.randn(2, 8, 5, 5)
    exported = torch.export.export(form, (given,)).module()
    torch.testing.assert_close(exported(given), form(given))
    other = FixedBasisConvolution(layer, torch.zeros(3, 3, 3)).eval()
    other.load_state_dict(form.state_dict())
    assert torch.equal(other(given), form(given))
    assert relative(other.to_dense().weight, form.to_dense().weight) == 0
