"""The laws of `tests/methods/test_methods.py` for recurrent layers, and what is special to them."""

import copy
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from recurrent import (
    HIDDEN,
    INPUTS,
    assert_same,
    cell_of,
    every_cell,
    every_kind,
    make,
    moments_for,
    run_cell,
    sequences,
    start_of,
)
from tensors import tensor_of, weight_of
from torch import nn

from rankfold.cost import count_layer_macs, count_parameters
from rankfold.errors import RankError, TensorError
from rankfold.layers import FewerUnits
from rankfold.methods import METHODS, WEIGHT_METRIC, Moments, RemoveUnits

METHOD = METHODS["fewer-units"]()
KINDS = every_kind()
every = pytest.mark.parametrize(("kind", "settings"), KINDS)
KNOWN = pytest.mark.parametrize("known", ["nothing", "states", "gradients", "both"])


def squared_error(form: FewerUnits, moments: Moments) -> float:
    """tr(G Δ A Δᵀ) of the states, Δ what becomes of them less the identity; over tr(G A)."""
    error = whole = 0.0
    assert moments.inputs is not None
    for block, states in enumerate(moments.inputs):
        identity = torch.eye(len(states), dtype=torch.float64)
        gradients = identity if moments.gradients is None else moments.gradients[block]
        selected = identity[form.kept[block]]
        difference = form.states[block].detach().double().mT @ selected - identity
        error += (gradients @ difference @ states @ difference.mT).trace().item()
        whole += (gradients @ states).trace().item()
    return error / whole


@every
@KNOWN
def test_at_full_rank_nothing_changes(kind, settings, known) -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        layer = make(kind, settings, dtype)
        form = METHOD.fit(layer, moments_for(layer, known)).build((HIDDEN,))
        with torch.no_grad():
            for given in sequences(layer, dtype=dtype):
                assert_same(form(given), layer(given), tolerance)


@every
def test_at_full_rank_singular_moments_and_given_states_change_nothing(kind, settings) -> None:
    layer = make(kind, settings)
    form = METHOD.fit(layer, moments_for(layer, rank=2)).build((HIDDEN,))
    with torch.no_grad():
        for given in sequences(layer):
            start = start_of(layer, given)
            assert_same(form(given, start), layer(given, start))


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


@every
@pytest.mark.parametrize("known", ["states", "both"])
def test_the_loss_is_the_error_of_the_states(kind, settings, known) -> None:
    layer = make(kind, settings)
    moments = moments_for(layer, known)
    family = METHOD.fit(layer, moments)
    for rank in family.ranks():
        error = squared_error(family.build(rank), moments)
        assert family.loss(rank) == pytest.approx(error, rel=1e-5, abs=1e-8)
    scaled = METHOD.fit(layer, Moments(moments.inputs, moments.gradients, 3.0))
    whole = torch.eye(HIDDEN).double() if moments.gradients is None else moments.gradients
    assert scaled.loss((8,)) == pytest.approx(
        3 * family.loss((8,)) * (whole * moments.inputs).sum().item()
    )


@every
@KNOWN
def test_the_loss_does_not_grow_with_rank(kind, settings, known) -> None:
    layer = make(kind, settings)
    family = METHODS["fewer-units"](alignment=1).fit(layer, moments_for(layer, known))
    losses = [family.loss(rank) for rank in family.ranks()]
    assert all(more <= less for less, more in pairwise(losses))
    assert losses[0] > 1e-2 > losses[-1]
    assert losses[-1] == pytest.approx(0, abs=1e-8)
    kept = [set(family.build(rank).kept[0].tolist()) for rank in family.ranks()]
    assert all(fewer < more for fewer, more in pairwise(kept))


@every
def test_in_a_metric_a_layer_is_served_better_by_what_is_fitted_in_it(kind, settings) -> None:
    layer = make(kind, settings)
    moments = moments_for(layer)
    family = METHOD.fit(layer, moments)
    for other in (WEIGHT_METRIC, Moments(moments.inputs), Moments(gradients=moments.gradients)):
        for rank in family.ranks()[:-1]:
            theirs = squared_error(METHOD.fit(layer, other).build(rank), moments)
            assert squared_error(family.build(rank), moments) < theirs


def test_the_units_are_nearly_the_best_there_are() -> None:
    """Of all subsets of 10 units, with correlated states."""
    layer = nn.LSTM(4, 10)
    ratios = []
    for seed in range(8):
        states = weight_of(10, seed, 5) + 0.1 * torch.eye(10)
        gradients = weight_of(10, 50)
        moments = Moments(states[None], gradients[None])
        found = METHODS["fewer-units"](alignment=1).fit(layer, moments)
        for rank in (3, 6):
            errors = []
            for kept in map(list, combinations(range(10), rank)):
                least = states - states[:, kept] @ states[kept][:, kept].inverse() @ states[kept]
                errors.append((gradients * least).sum().item())
            ratios.append(found.loss((rank,)) * (gradients * states).sum().item() / min(errors))
    assert min(ratios) == pytest.approx(1, abs=1e-6)
    assert max(ratios) < 2 and sum(ratios) / len(ratios) < 1.25


def test_the_readout_is_the_best_there_is() -> None:
    """Steps to both sides of it cost the same."""
    layer = make(nn.GRU, {})
    moments = moments_for(layer)
    form = METHOD.fit(layer, moments).build((8,))
    least = squared_error(form, moments)
    removed = [unit for unit in range(HIDDEN) if unit not in form.kept[0]]
    for seed in range(10):
        step = torch.zeros_like(form.states)
        step[:, :, removed] = 1e-2 * tensor_of((1, 8, len(removed)), seed=seed)
        errors = []
        for sign in (1, -1):
            moved = copy.deepcopy(form)
            moved.states.data += sign * step
            errors.append(squared_error(moved, moments))
        assert min(errors) > least
        assert errors[0] - least == pytest.approx(errors[1] - least, rel=1e-4)


def states_of(layer: Any, given: torch.Tensor) -> torch.Tensor:
    """A of a layer of one direction, from its outputs."""
    rows = layer(given)[0].detach().flatten(0, 1)
    return (rows.mT @ rows / len(rows))[None]


def with_twins(layer: Any) -> Any:
    """Unit 8 + i, 16 + i made of the same weights as unit i, so that their states are the same."""
    with torch.no_grad():
        for parameter in layer.parameters():
            gates = parameter.view(-1, HIDDEN, *parameter.shape[1:])
            for start in (8, 16):
                gates[:, start : start + 8] = gates[:, :8]
    return layer


KINDS_OF_CELLS = [
    (nn.LSTM, {}),
    (nn.GRU, {}),
    (nn.RNN, {}),
    (nn.RNN, {"nonlinearity": "relu"}),
    (nn.GRU, {"bias": False}),
]


@pytest.mark.parametrize(("kind", "settings"), KINDS_OF_CELLS, ids=str)
def test_dependent_units_are_removed_without_loss(kind, settings) -> None:
    layer = with_twins(make(kind, settings))
    given = tensor_of((20, 6, INPUTS), seed=5)
    family = METHOD.fit(layer, Moments(states_of(layer, given)))
    assert family.loss((8,)) < 1e-8
    form = family.build((8,))
    assert_same(form(given)[0], layer(given)[0], 1e-6)
    assert len({unit % 8 for unit in form.kept[0].tolist()}) == 8


@every
def test_dead_units_are_removed_without_loss_and_without_data(kind, settings) -> None:
    layer = make(kind, settings)
    dead = list(range(1, 17))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.view(-1, HIDDEN, *parameter.shape[1:])[:, dead] = 0
    family = METHOD.fit(layer, WEIGHT_METRIC)
    assert family.loss((8,)) == pytest.approx(0, abs=1e-12)
    form = family.build((8,))
    for given in sequences(layer):
        ours, theirs = form(given), layer(given)
        assert_same(ours, theirs)
        assert not torch.isin(form.kept, torch.tensor(dead)).any()


@pytest.mark.parametrize(("kind", "settings"), KINDS_OF_CELLS, ids=str)
def test_compensation_brings_the_outputs_nearer(kind, settings) -> None:
    """Than the same units without it; with inputs of three directions."""
    layer = make(kind, settings)
    given = tensor_of((30, 8, 3), seed=6) @ tensor_of((3, INPUTS), seed=7)
    form = METHOD.fit(layer, Moments(states_of(layer, given))).build((16,))
    dropped = METHOD.fit(layer, Moments(torch.eye(HIDDEN).double()[None]))
    object.__setattr__(dropped, "order", METHOD.fit(layer, Moments(states_of(layer, given))).order)
    exact = layer(given)[0]
    ours = (form(given)[0] - exact).norm()
    theirs = (dropped.build((16,))(given)[0] - exact).norm()
    assert ours < 0.5 * theirs


def closed_form_cost(kind: type, settings: dict[str, Any], units: int) -> tuple[int, int, int]:
    """Parameters, those of the states among them, and MACs of a step, by hand."""
    gates = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[kind]
    directions = 2 if settings.get("bidirectional") else 1
    layers = settings.get("num_layers", 1)
    widths = [INPUTS, *[directions * units] * (layers - 1)]
    weights = sum(directions * gates * units * (width + units) for width in widths)
    biases = 2 * layers * directions * gates * units if settings.get("bias", True) else 0
    readout = directions * units * directions * HIDDEN
    states = layers * directions * units * HIDDEN
    return weights + biases + readout + states, states, weights + readout


@every
def test_costs_are_those_of_the_closed_formulas(kind, settings) -> None:
    layer = make(kind, settings)
    for units in (8, 16, 24):
        skeleton = METHOD.skeleton(layer, (units,))
        parameters, states, per_step = closed_form_cost(kind, settings, units)
        assert count_parameters(skeleton) == parameters
        # h_n, and c_n, are given back once for each sequence.
        finals = 3 * states * (2 if kind is nn.LSTM else 1)
        shape = (3, 5, INPUTS) if layer.batch_first else (5, 3, INPUTS)
        assert count_layer_macs(skeleton, [shape]) == 15 * per_step + finals


@every
def test_every_weight_gets_a_gradient(kind, settings) -> None:
    layer = make(kind, settings)
    form = METHOD.fit(layer, moments_for(layer)).build((8,))
    output, states = form(sequences(layer)[0])
    finals = states if isinstance(states, tuple) else (states,)
    (output.square().sum() + sum(final.square().sum() for final in finals)).backward()
    for parameter in form.parameters():
        assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@every
def test_dtype_mode_and_gradients_are_those_of_the_layer(kind, settings, dtype) -> None:
    exact = make(kind, settings).train()
    layer = copy.deepcopy(exact).to(dtype)
    layer.weight_ih_l0.requires_grad_(False)
    moments = moments_for(layer)
    form = METHOD.fit(layer, moments).build((8,))
    assert {parameter.dtype for parameter in form.parameters()} == {dtype}
    assert all(module.training for module in form.modules())
    assert not form.recurrent.weight_ih_l0.requires_grad
    assert form.recurrent.weight_hh_l0.requires_grad and form.readout.weight.requires_grad
    reference = METHOD.fit(exact, moments).build((8,))
    assert torch.equal(form.kept, reference.kept)
    rounding = {torch.float16: 5e-3, torch.bfloat16: 4e-2, torch.float32: 1e-6}
    for name, parameter in form.named_parameters():
        assert_same(parameter, reference.get_parameter(name), rounding[dtype])


@every
def test_no_memory_is_shared(kind, settings) -> None:
    layer = make(kind, settings)
    form = METHOD.fit(layer, WEIGHT_METRIC).build((HIDDEN,))
    before = copy.deepcopy(form.state_dict())
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], value) for name, value in form.state_dict().items())


def test_impossible_ranks_are_refused() -> None:
    layer = make(nn.LSTM, {})
    family = METHOD.fit(layer, WEIGHT_METRIC)
    for rank in ((0,), (-8,), (HIDDEN + 1,), (), (8, 8)):
        for refusing in (family.build, family.loss, lambda r: METHOD.skeleton(layer, r)):
            with pytest.raises(RankError):
                refusing(rank)


@every
@KNOWN
def test_weights_that_cannot_be_are_refused_and_zeros_are_not(kind, settings, known) -> None:
    layer = make(kind, settings)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    form = METHOD.fit(layer, moments_for(layer, known)).build((8,))
    assert form(sequences(layer)[0])[0].abs().max() == 0
    for name, _ in layer.named_parameters():
        broken = copy.deepcopy(layer)
        with torch.no_grad():
            broken.get_parameter(name).view(-1)[3] = torch.nan
        with pytest.raises(ValueError, match="NaN"):
            METHOD.fit(broken, moments_for(layer, known))


@every
@pytest.mark.parametrize("rank", [0, 1])
def test_singular_moments_give_finite_weights(kind, settings, rank) -> None:
    layer = make(kind, settings)
    whole = moments_for(layer, rank=rank)
    for moments in (whole, Moments(whole.inputs), Moments(gradients=whole.gradients)):
        family = METHOD.fit(layer, moments)
        for units in family.ranks():
            form = family.build(units)
            assert all(torch.isfinite(parameter).all() for parameter in form.parameters())
            assert 0 <= family.loss(units) <= 1 + 1e-6
    if rank == 1:  # one unit says all of the others
        assert METHOD.fit(layer, whole).loss((8,)) < 1e-6


def test_candidates_are_aligned() -> None:
    assert METHOD.fit(nn.LSTM(4, 30), WEIGHT_METRIC).ranks() == [(8,), (16,), (24,), (30,)]
    assert METHOD.fit(nn.LSTM(4, 30), WEIGHT_METRIC).spectra == ()


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.Linear(32, 32), "no factorization for Linear layers"),
        (nn.LSTMCell(32, 8), "only 8 hidden units"),
        (nn.LSTM(32, 32, proj_size=16), "its 32 units are projected to 16 already"),
        (nn.GRU(32, 8), "only 8 hidden units"),
    ],
    ids=str,
)
def test_layers_that_it_does_not_take_and_why(layer, words) -> None:
    assert words in METHOD.why_not(layer)


def test_moments_that_rounding_left_indefinite_are_served() -> None:
    layer = make(nn.LSTM, {})
    moments = moments_for(layer, rank=3)
    rounded = Moments(moments.inputs.float().double() - 1e-8 * torch.eye(HIDDEN), moments.gradients)
    family = METHOD.fit(layer, rounded)
    assert 0 <= family.loss((8,)) < 1e-4
    assert family.build((8,)).states.abs().max() < 1e3


cells = pytest.mark.parametrize(("kind", "of", "settings"), every_cell())


@cells
@KNOWN
def test_a_cell_does_what_the_recurrent_layer_does(kind, of, settings, known) -> None:
    """Of the same moments the same units and losses, and step by step the same states."""
    layer = make(of, settings)
    cell = cell_of(kind, layer)
    families = [METHOD.fit(one, moments_for(layer, known)) for one in (layer, cell)]
    assert families[0].ranks() == families[1].ranks()
    for rank in families[0].ranks():
        assert families[0].loss(rank) == families[1].loss(rank)
        form, of_cell = (family.build(rank) for family in families)
        assert torch.equal(form.kept[0], of_cell.kept)
        given = tensor_of((5, 3, INPUTS), seed=1)
        start = start_of(layer, given)
        whole, states = form(given, start)
        one = tuple(s[0] for s in start) if isinstance(start, tuple) else start[0]
        ours, last = run_cell(of_cell, given, one)
        assert_same(ours, whole)
        assert_same(last, tuple(s[0] for s in states) if isinstance(states, tuple) else states[0])
        assert_same(run_cell(of_cell, given[:, 0])[0], form(given[:, 0])[0])


@cells
def test_a_cell_at_full_rank_and_its_skeleton(kind, of, settings) -> None:
    cell = cell_of(kind, make(of, settings, torch.float32))
    family = METHOD.fit(cell, WEIGHT_METRIC)
    assert METHOD.why_not(cell) is None
    given = tensor_of((4, 3, INPUTS), torch.float32)
    assert_same(run_cell(family.build((HIDDEN,)), given), run_cell(cell, given), 1e-5)
    skeleton, form = METHOD.skeleton(cell, (8,)), family.build((8,))
    assert all(value.is_meta for value in skeleton.state_dict().values())
    assert repr(skeleton) == repr(form)
    gates = len(cell.weight_hh) // HIDDEN
    matrices = gates * 8 * (INPUTS + 8) + 8 * HIDDEN
    biases = 2 * gates * 8 if cell.bias else 0
    assert count_parameters(skeleton) == count_parameters(form) == matrices + biases
    states = 2 if kind is nn.LSTMCell else 1  # that are read out
    macs = 5 * 3 * (matrices + (states - 1) * 8 * HIDDEN)
    assert count_layer_macs(skeleton, [(3, INPUTS)] * 5) == macs
    again = METHOD.skeleton(cell, (8,)).to_empty(device="cpu")
    again.load_state_dict(form.state_dict())
    assert_same(run_cell(again.eval(), given), run_cell(form, given), 0)
    run_cell(form, given)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in form.parameters())
    for rank in ((0,), (HIDDEN + 1,)):
        with pytest.raises(RankError):
            METHOD.skeleton(cell, rank)


def test_weights_whose_fourth_powers_overflow_are_refused() -> None:
    layer = nn.LSTM(24, 16).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1e150)
    with pytest.raises(TensorError, match="too large for float64"):
        RemoveUnits().fit(layer, Moments())
