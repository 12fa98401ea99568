"""The laws of `tests/methods/test_methods.py` for projected inputs, and what is special to them."""

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from recurrent import HIDDEN, INPUTS, assert_same, every_kind, make, sequences, start_of
from tensors import tensor_of, weight_of
from torch import nn

from rankfold.cost import count_layer_macs, count_parameters
from rankfold.errors import RankError
from rankfold.layers import ProjectedInputs, block_names, directions_of, recurrent_weight
from rankfold.methods import METHODS, WEIGHT_METRIC, Moments

METHOD = METHODS["low-rank-inputs"](alignment=2)
every = pytest.mark.parametrize(("kind", "settings"), every_kind())
KNOWN = pytest.mark.parametrize("known", ["nothing", "inputs", "gradients", "both"])


def moments_for(known: str = "both", size: int = INPUTS, rank: int | None = None) -> Moments:
    """Of the inputs; those of the states are of another size, and not to be looked at."""
    given = Moments(
        weight_of(size, 1, rank) if known in ("inputs", "both") else None,
        weight_of(size, 11) if known in ("gradients", "both") else None,
    )
    return Moments(torch.eye(3)[None], torch.eye(3)[None], 7.0, given)


def input_weights(layer) -> torch.Tensor:
    names = block_names(layer)[: directions_of(layer)]
    return torch.cat([getattr(layer, f"weight_ih{name}").detach() for name in names])


@every
@KNOWN
def test_at_full_rank_nothing_changes(kind, settings, known) -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        layer = make(kind, settings, dtype)
        form = METHOD.fit(layer, moments_for(known)).build((INPUTS,))
        with torch.no_grad():
            for given in sequences(layer, dtype=dtype):
                assert_same(form(given), layer(given), tolerance)


@every
def test_it_is_the_dense_layer_of_its_weights(kind, settings) -> None:
    layer = make(kind, settings)
    form = METHOD.fit(layer, moments_for()).build((4,))
    dense = form.to_dense()
    assert type(dense) is kind and repr(dense) == repr(layer) and not dense.training
    assert torch.linalg.matrix_rank(input_weights(dense)) == 4
    form.flatten_parameters()
    with torch.no_grad():
        for given in sequences(layer):
            start = start_of(layer, given)
            assert_same(form(given, start), dense(given, start))
            assert_same(form(given), dense(given))
    # All but the input matrices of the first layer are as they were.
    changed = {f"weight_ih{name}" for name in block_names(layer)[: directions_of(layer)]}
    for name, value in layer.state_dict().items():
        assert torch.equal(value, dense.state_dict()[name]) != (name in changed)


@every
@pytest.mark.parametrize("known", ["inputs", "both"])
def test_the_loss_is_the_error_of_the_inputs_or_of_the_gates(kind, settings, known) -> None:
    layer = make(kind, settings)
    moments = moments_for(known)
    assert moments.given is not None and moments.given.inputs is not None
    family = METHOD.fit(layer, moments)
    scaled = METHOD.fit(layer, replace(moments, given=replace(moments.given, scale=3.0)))
    weight = input_weights(layer)
    gradients = moments.given.gradients
    if gradients is None:  # as the gates read, an input on average once
        reads = weight.mT @ weight
        gradients = reads / reads.diagonal().mean()
    whole = (gradients * moments.given.inputs).sum().item()
    losses = [family.loss(rank) for rank in family.ranks()]
    assert all(more < less for less, more in pairwise(losses))
    for rank in family.ranks():
        form = family.build(rank)
        # Least squares, since a projection of the inputs is not unique where gates see less.
        difference = torch.linalg.pinv(weight) @ input_weights(form.to_dense()) - torch.eye(INPUTS)
        error = (gradients @ difference * (difference @ moments.given.inputs)).sum().item()
        assert family.loss(rank) == pytest.approx(error / whole, rel=1e-6, abs=1e-10)
        assert scaled.loss(rank) == pytest.approx(3 * error, rel=1e-6, abs=1e-9)


@every
def test_in_a_metric_what_is_fitted_in_it_is_better(kind, settings) -> None:
    layer = make(kind, settings)
    moments = moments_for()
    weight, given = input_weights(layer), moments.given
    assert given is not None and given.inputs is not None and given.gradients is not None

    def error(of: Moments, rank: tuple[int, ...]) -> float:
        form = METHOD.fit(layer, of).build(rank)
        difference = torch.linalg.pinv(weight) @ input_weights(form.to_dense()) - torch.eye(INPUTS)
        return (given.gradients @ difference * (difference @ given.inputs)).sum().item()

    for other in (WEIGHT_METRIC, moments_for("inputs"), moments_for("gradients")):
        for rank in METHOD.fit(layer, moments).ranks()[:-1]:
            assert error(moments, rank) < error(other, rank)


@pytest.mark.parametrize("known", ["nothing", "inputs", "gradients", "both"])
def test_more_inputs_than_gates_see_cost_nothing_beyond_these(known) -> None:
    """A GRU of 8 units sees 24 numbers of 40 inputs."""
    layer = nn.GRU(40, 8, dtype=torch.float64)
    family = METHOD.fit(layer, moments_for(known, 40))
    assert family.ranks()[-1] == (24,) and family.loss((24,)) < 1e-9
    given = tensor_of((5, 3, 40), seed=1)
    with torch.no_grad():
        assert_same(family.build((24,))(given), layer(given), 1e-7)
    assert family.loss((22,)) > 1e-6
    assert family.spectra[0].shape == (24, 40)


def test_inputs_of_a_subspace_are_projected_without_loss() -> None:
    layer = make(nn.LSTM, {"bidirectional": True})
    basis = tensor_of((3, INPUTS), seed=2)
    given = tensor_of((7, 2, 3), seed=3) @ basis
    rows = given.flatten(0, 1)
    seen = Moments(rows.mT @ rows / len(rows), weight_of(INPUTS, 4))
    family = METHODS["low-rank-inputs"](alignment=1).fit(layer, Moments(given=seen))
    assert family.loss((3,)) < 1e-9 < family.loss((2,))
    with torch.no_grad():
        assert_same(family.build((3,))(given), layer(given), 1e-6)


@every
def test_skeleton_costs_and_state_are_those_of_the_fitted_layer(kind, settings) -> None:
    layer = make(kind, settings, torch.float32)
    family = METHOD.fit(layer, WEIGHT_METRIC)
    gates = directions_of(layer) * len(recurrent_weight(layer))
    for rank in family.ranks():
        skeleton, form = METHOD.skeleton(layer, rank), family.build(rank)
        assert all(value.is_meta for value in skeleton.state_dict().values())
        assert repr(skeleton) == repr(form)
        saved = rank[0] * (INPUTS + gates) - INPUTS * gates
        assert count_parameters(skeleton) == count_parameters(layer) + saved
        shape = (3, 5, INPUTS)
        dense_macs = count_layer_macs(copy.deepcopy(layer).to("meta"), [shape])
        assert count_layer_macs(skeleton, [shape]) == dense_macs + 15 * saved
        again = METHOD.skeleton(layer, rank).to_empty(device="cpu").eval()
        again.load_state_dict(form.state_dict())
        given = sequences(layer, dtype=torch.float32)[0]
        assert_same(again(given), form(given), 0)


def test_it_is_exported_and_trained() -> None:
    layer = make(nn.GRU, {"bidirectional": True}, torch.float32)
    form = METHOD.fit(layer, moments_for()).build((4,))
    given = sequences(layer, dtype=torch.float32)[0]
    exported = torch.export.export(form, (given,)).module()
    assert_same(exported(given), form(given), 1e-6)
    form(given)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in form.parameters())
    assert form.recurrent.weight_hh_l0.data_ptr() != layer.weight_hh_l0.data_ptr()


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.Linear(32, 32), "no factorization for Linear layers"),
        (nn.LSTM(32, 32, proj_size=16), "its 32 units are projected to 16 already"),
        (nn.GRU(2, 32), "only 2 inputs to project"),
    ],
    ids=str,
)
def test_layers_that_it_does_not_take_and_why(layer, words) -> None:
    assert words in METHOD.why_not(layer)


def test_what_is_wrong_is_refused() -> None:
    layer = nn.LSTM(INPUTS, HIDDEN)
    family = METHOD.fit(layer, WEIGHT_METRIC)
    for rank in ((0,), (INPUTS + 1,), (2, 2)):
        for ask in (family.loss, family.build, lambda rank: METHOD.skeleton(layer, rank)):
            with pytest.raises(RankError):
                ask(rank)
    with pytest.raises(RankError):
        ProjectedInputs(layer, INPUTS + 1)
    with pytest.raises(ValueError, match="alignment"):
        METHODS["low-rank-inputs"](alignment=0)
