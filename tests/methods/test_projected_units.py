"""The laws of `tests/methods/test_methods.py` for a projected LSTM, and what is special to it."""

import copy
from itertools import pairwise

import pytest
import torch
from recurrent import (
    HIDDEN,
    INPUTS,
    assert_same,
    every_kind,
    make,
    moments_for,
    sequences,
    start_of,
)
from tensors import tensor_of
from torch import nn

from rankfold.cost import count_layer_macs, count_parameters
from rankfold.errors import RankError
from rankfold.layers import ProjectedUnits, block_names, directions_of
from rankfold.methods import METHODS, WEIGHT_METRIC, Moments

METHOD = METHODS["projected-units"]()
KINDS = [case for case in every_kind() if case.values[0] is nn.LSTM]
every = pytest.mark.parametrize(("kind", "settings"), KINDS)
KNOWN = pytest.mark.parametrize("known", ["nothing", "states", "gradients", "both"])


def projections(form: ProjectedUnits) -> torch.Tensor:
    return torch.stack(
        [
            getattr(form.recurrent, f"weight_hr{name}").detach()
            for name in block_names(form.recurrent)
        ]
    )


def squared_error(form: ProjectedUnits, moments: Moments) -> float:
    """tr(G Δ A Δᵀ) of the states, Δ what becomes of them less the identity; over tr(G A)."""
    assert moments.inputs is not None and moments.gradients is not None
    difference = form.states.detach().mT @ projections(form) - torch.eye(HIDDEN).double()
    error = torch.einsum(
        "bij,bjk,bkl,bil->", moments.gradients, difference, moments.inputs, difference
    )
    return (error / (moments.gradients * moments.inputs).sum()).item()


@every
@KNOWN
def test_with_all_states_but_one_that_says_nothing_nothing_changes(kind, settings, known) -> None:
    """At full rank torch has no projection."""
    layer = make(kind, settings)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.view(4, HIDDEN, -1)[:, 5] = 0  # so that the state of unit 5 is 0
    moments = moments_for(layer, known)
    if moments.inputs is not None:
        moments.inputs[:, 5] = moments.inputs[:, :, 5] = 0
    form = METHOD.fit(layer, moments).build((HIDDEN - 1,))
    with torch.no_grad():
        for given in sequences(layer):
            assert_same(form(given), layer(given), 1e-7)


@every
def test_states_go_in_and_come_out_as_those_of_all_units(kind, settings) -> None:
    layer = make(kind, settings)
    form = METHOD.fit(layer, moments_for(layer)).build((8,))
    for given in sequences(layer):
        start = start_of(layer, given)
        output, (hidden, cells) = form(given, start)
        dense, states = layer(given, start)
        assert type(output) is type(dense)
        assert (hidden.shape, cells.shape) == tuple(state.shape for state in states)
    # A sequence in two parts is the whole, but for what a backward direction sees.
    single = make(kind, {**settings, "bidirectional": False})
    form = METHOD.fit(single, moments_for(single)).build((8,))
    # What is projected once stays as it is: P R is the identity.
    reached = projections(form) @ form.states.detach().mT
    assert_same(reached, torch.eye(8).double().expand_as(reached), 1e-9)
    axis = 1 if single.batch_first else 0
    given = sequences(single)[0]
    first, second = given.split((2, 3), axis)
    output, states = form(first)
    rest, _ = form(second, states)
    assert_same(torch.cat([output, rest], axis), form(given)[0], 1e-9)


@every
def test_skeleton_and_fitted_layer_agree(kind, settings) -> None:
    layer = make(kind, settings)
    family = METHOD.fit(layer, WEIGHT_METRIC)
    for rank in family.ranks():
        skeleton, form = METHOD.skeleton(layer, rank), family.build(rank)
        assert all(value.is_meta for value in skeleton.state_dict().values())
        assert {n: v.shape for n, v in skeleton.state_dict().items()} == {
            n: v.shape for n, v in form.state_dict().items()
        }
        assert repr(skeleton) == repr(form)
        other = METHOD.skeleton(layer, rank).to_empty(device="cpu").eval()
        other.load_state_dict(form.state_dict())
        assert_same(other(sequences(layer)[0]), form(sequences(layer)[0]))


@every
def test_the_loss_is_the_error_of_the_states_and_falls_with_rank(kind, settings) -> None:
    layer = make(kind, settings)
    moments = moments_for(layer)
    family = METHODS["projected-units"](alignment=1).fit(layer, moments)
    losses = [family.loss(rank) for rank in family.ranks()]
    assert all(more <= less for less, more in pairwise(losses))
    for rank in family.ranks()[::5]:
        assert family.loss(rank) == pytest.approx(squared_error(family.build(rank), moments))


@every
def test_no_fewer_units_say_as_much_as_so_many_projections_of_all(kind, settings) -> None:
    layer = make(kind, settings)
    moments = moments_for(layer)
    projected, fewer = (
        METHODS[name]().fit(layer, moments) for name in ("projected-units", "fewer-units")
    )
    for rank in projected.ranks()[:-1]:
        assert projected.loss(rank) < fewer.loss(rank)


def test_states_in_a_subspace_are_projected_without_loss() -> None:
    """Units that are mixtures of a few: here the twins of eight."""
    layer = make(nn.LSTM, {})
    with torch.no_grad():
        for parameter in layer.parameters():
            gates = parameter.view(4, HIDDEN, -1)
            for start in (8, 16):
                gates[:, start : start + 8] = gates[:, :8]
    given = tensor_of((20, 6, INPUTS), seed=5)
    rows = layer(given)[0].detach().flatten(0, 1)
    family = METHOD.fit(layer, Moments((rows.mT @ rows / len(rows))[None]))
    assert family.loss((8,)) < 1e-8
    assert_same(family.build((8,))(given)[0], layer(given)[0], 1e-6)


@every
def test_costs_are_those_of_the_closed_formulas(kind, settings) -> None:
    layer = make(kind, settings)
    directions, layers = directions_of(layer), layer.num_layers
    for rank in (8, 16):
        skeleton = METHOD.skeleton(layer, (rank,))
        widths = [INPUTS, *[directions * rank] * (layers - 1)]
        weights = sum(
            directions * (4 * HIDDEN * (width + rank) + rank * HIDDEN) for width in widths
        )
        biases = 2 * layers * directions * 4 * HIDDEN if layer.bias else 0
        readout = directions * rank * directions * HIDDEN
        states = layers * directions * rank * HIDDEN
        assert count_parameters(skeleton) == weights + biases + readout + states
        shape = (3, 5, INPUTS) if layer.batch_first else (5, 3, INPUTS)
        macs = 15 * (weights + readout) + 3 * states  # h_n is given back once for each sequence
        assert count_layer_macs(skeleton, [shape]) == macs


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_mode_gradients_and_memory_are_the_forms_own(kind, settings, dtype) -> None:
    layer = make(kind, settings, dtype).train()
    layer.weight_ih_l0.requires_grad_(False)
    form = METHOD.fit(layer, moments_for(layer)).build((8,))
    assert {parameter.dtype for parameter in form.parameters()} == {dtype}
    assert all(module.training for module in form.modules())
    assert not form.recurrent.weight_ih_l0.requires_grad
    output, (hidden, cells) = form(sequences(layer, dtype=dtype)[0])
    (output.square().sum() + hidden.square().sum() + cells.square().sum()).backward()
    for name, parameter in form.named_parameters():
        if name != "recurrent.weight_ih_l0":
            assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().sum() > 0
    before = copy.deepcopy(form.state_dict())
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], value) for name, value in form.state_dict().items())


@every
@pytest.mark.parametrize("rank", [0, 1])
def test_singular_moments_give_finite_weights(kind, settings, rank) -> None:
    layer = make(kind, settings)
    whole = moments_for(layer, rank=rank)
    for moments in (whole, Moments(whole.inputs), Moments(gradients=whole.gradients)):
        family = METHOD.fit(layer, moments)
        for states in family.ranks():
            form = family.build(states)
            assert all(torch.isfinite(parameter).all() for parameter in form.parameters())
            assert 0 <= family.loss(states) <= 1 + 1e-6


def test_impossible_ranks_are_refused_and_candidates_are_aligned() -> None:
    layer = make(nn.LSTM, {})
    family = METHOD.fit(layer, WEIGHT_METRIC)
    assert family.ranks() == [(8,), (16,), (HIDDEN - 1,)] and family.spectra == ()
    for rank in ((0,), (-8,), (HIDDEN,), (), (8, 8)):
        for refusing in (family.build, family.loss, lambda r: METHOD.skeleton(layer, r)):
            with pytest.raises(RankError):
                refusing(rank)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.Linear(32, 32), "no factorization for Linear layers"),
        (nn.GRU(32, 32), "no factorization for GRU layers"),
        (nn.LSTM(32, 32, proj_size=16), "its 32 units are projected to 16 already"),
        (nn.LSTM(32, 8), "only 8 hidden units"),
    ],
    ids=str,
)
def test_layers_that_it_does_not_take_and_why(layer, words) -> None:
    assert words in METHOD.why_not(layer)
