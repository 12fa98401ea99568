"""Networks that were never trained, in factors."""

import pytest
import torch
from geometry import relative
from networks import make_data, make_model

import rankfold
from rankfold.errors import BudgetError
from rankfold.layers import TwoFactorLinear
from rankfold.training import FrobeniusDecay, spectral_initialisation


def test_factors_are_those_of_the_truncated_svd_each_of_its_root() -> None:
    model = make_model()
    small = spectral_initialisation(model, make_data(), fraction=0.25)
    assert isinstance(small.head, TwoFactorLinear)
    left, values, right = torch.linalg.svd(model.head.weight.detach(), full_matrices=False)
    rank = small.head[0].out_features
    assert rank == 16
    expected = left[:, :rank] @ values[:rank].diag() @ right[:rank]
    # Singular values of random weights are close to each other: rounding turns their vectors.
    assert relative(small.head.to_dense().weight.detach(), expected) < 1e-4
    roots = values[:rank].sqrt()
    torch.testing.assert_close(small.head[0].weight.detach().norm(dim=1), roots)
    torch.testing.assert_close(small.head[1].weight.detach().norm(dim=0), roots)


def test_it_is_what_analysis_plan_and_factorization_make() -> None:
    model, data = make_model(), make_data()
    analysis = rankfold.analyze(model, data, methods=["svd"], metric="weight")
    expected = rankfold.factorize(model, analysis.plan(macs=0.5))
    found = spectral_initialisation(model, data, macs=0.5)
    assert repr(found) == repr(expected)
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)


def test_it_is_trained_saved_and_loaded(tmp_path) -> None:
    small = spectral_initialisation(
        make_model(), make_data(), fraction=0.5, methods=["separable", "svd"]
    )
    rankfold.recover(
        small, make_data(), teacher=make_model(), penalty=FrobeniusDecay(1e-3), epochs=1
    )
    rankfold.save(small, tmp_path / "small")
    again = rankfold.load(tmp_path / "small", like=make_model)
    assert torch.equal(again(make_data()[0]), small.eval()(make_data()[0]))


def test_random_weights_set_no_rank_by_themselves() -> None:
    with pytest.raises(BudgetError, match="random weights"):
        spectral_initialisation(make_model(), make_data())
