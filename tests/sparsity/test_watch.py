import pytest
import torch
from sparse_networks import make
from torch import nn

from rankfold.batches import run
from rankfold.errors import ModelError
from rankfold.sparsity.shadows import FIXED, RESHAPES, SLICES
from rankfold.sparsity.structure import find_structure, zeros_reach_readers
from rankfold.sparsity.watch import Structure, rows_by_inputs, watch


def seen(name: str) -> Structure:
    model, batch = make(name)
    return watch(model, batch, run)


def sides(structure: Structure) -> dict[str, tuple[list[int], list[int]]]:
    return {
        layer.name: (layer.outputs.tolist(), layer.inputs.tolist()) for layer in structure.layers
    }


def test_channels_of_one_layer_after_the_other() -> None:
    structure = seen("one after the other")
    hidden = list(range(1, 7))
    assert sides(structure) == {"first": (hidden, [FIXED] * 6), "out": ([FIXED] * 5, hidden)}
    assert structure.count == 7
    assert [layer.norm for layer in structure.layers] == ["norm", None]
    assert [(one.name, one.channels.tolist()) for one in structure.norms] == [("norm", hidden)]
    assert structure.branches == ()


def test_channels_of_a_residual_block_and_its_branch() -> None:
    structure = seen("a residual block")
    found = sides(structure)
    stem, inner = found["third"][0], found["first"][0]
    assert found["first"] == (inner, stem) and found["second"] == (stem, inner)
    assert found["out"][1] == stem and not set(stem) & set(inner)
    (branch,) = structure.branches
    assert (branch.last, branch.modules) == ("other", ("first", "norm", "second", "other"))
    assert {layer.name: layer.norm for layer in structure.layers} == {
        "third": "third_norm",
        "first": "norm",
        "second": "other",
        "out": None,
    }


@pytest.mark.parametrize(
    ("name", "norm"),
    [("a norm of what else is read", None), ("norms before", None), ("shuffled", "norm")],
)
def test_a_norm_follows_a_layer_where_it_alone_reads_it(name, norm) -> None:
    structure = seen(name)
    assert structure.layers[0].norm == norm


def test_groups_are_one_channel() -> None:
    found = sides(seen("grouped"))["grouped"]
    assert found[0] == found[1] == [1, 1, 2, 2, 3, 3]


def test_zeros_go_forward() -> None:
    model, batch = make("a bias and no norm")
    with torch.no_grad():
        model.second.weight[2], model.second.bias[2] = 0, 0
        model.second.weight[3] = 0
    out = watch(model, batch, run).layers[1]
    assert out.zero_inputs.tolist() == [False, False, True, False, False, False]


def test_the_network_is_left_as_it_was() -> None:
    model, batch = make("a residual block")
    model.train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    find_structure(model, batch, run)
    assert all(one.training for one in model.modules())
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with pytest.raises(ModelError):
        watch(model, batch[:, :2], run)
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_width_that_is_written_is_noticed() -> None:
    for name, fixing in (
        ("flattened", frozenset()),
        ("flattened to a width that is written", RESHAPES),
        ("halves", frozenset()),
        ("the third channel", SLICES),
    ):
        model, batch = make(name)
        assert find_structure(model, batch, run).fixing == fixing


def test_zeros_that_reach_their_readers() -> None:
    for name, reach in (
        ("one after the other", True),
        ("an activation that makes something of nothing", False),
    ):
        model, batch = make(name)
        structure = find_structure(model, batch, run)
        found = zeros_reach_readers(model, structure, batch, run)
        assert found[structure.layers[0].outputs].all() == reach


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(4, 6),
        nn.Conv2d(4, 6, 3),
        nn.Conv1d(4, 6, 3, groups=2),
        nn.ConvTranspose2d(4, 6, 3),
        nn.ConvTranspose1d(4, 6, 3, groups=2),
    ],
)
def test_which_output_reads_which_input(layer) -> None:
    layer.double()
    with torch.no_grad():
        layer.weight[0, 0] = 0
    used = rows_by_inputs(layer)
    axis = -1 if isinstance(layer, nn.Linear) else 1
    for channel in range(4):
        batch = torch.zeros(4, *([6] * (layer.weight.dim() - 2))).double()
        batch[channel] = torch.rand(batch[channel].shape).double() + 1
        with torch.no_grad():
            made = layer(batch[None]) - layer(torch.zeros_like(batch)[None])
        moved = made.movedim(axis, 0).flatten(1).any(1)
        assert moved.tolist() == used[:, channel].tolist()
