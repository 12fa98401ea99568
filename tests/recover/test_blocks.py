"""Blocks trained one by one."""

import copy

import pytest
import torch
from networks import make_data, make_model
from torch import nn

import rankfold
from rankfold.errors import ModelError
from rankfold.methods import WEIGHT_METRIC, LowRank
from rankfold.recover import recover_blocks


class Block(nn.Module):
    """Takes one tensor in order, one by name, changes its input in place, and gives two."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 48), nn.Linear(48, 24)

    def forward(self, tensor: torch.Tensor, *, shift: torch.Tensor):
        tensor += shift
        hidden = torch.relu(self.up(tensor))
        return tensor + self.down(hidden), hidden


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.shift = nn.Parameter(torch.ones(24))
        self.head = nn.Linear(24, 6)

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        for block in self.blocks:
            tensor, _ = block(tensor, shift=self.shift)
        return self.head(tensor)


def two_networks(rank: int = 6):
    torch.manual_seed(0)
    model = Residual().eval()
    small = copy.deepcopy(model)
    for block in small.blocks:
        block.up = LowRank(alignment=1).fit(block.up, WEIGHT_METRIC).build((rank,))
    return model, small, list(torch.randn(160, 24).split(8))


def test_each_block_comes_nearer_and_the_rest_stays_as_it_is() -> None:
    model, small, data = two_networks()
    before = copy.deepcopy(small.state_dict())
    names = ["blocks.0", "blocks.1"]
    done = recover_blocks(small, model, data, names, learning_rate=3e-3)
    assert [one.layer for one in done.layers] == names and all(one.kept for one in done.layers)
    assert done.gain > 1.5
    assert done.layers[1].before == done.layers[0].after
    for name, value in small.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith("blocks"), name


def test_a_block_is_trained_on_what_it_gets_in_the_smaller_network() -> None:
    """A second block whose factors are exact makes up for what the first one does wrong."""
    model, small, data = two_networks()
    small.blocks[1] = copy.deepcopy(model.blocks[1])
    done = recover_blocks(small, model, data, ["blocks.1"], learning_rate=3e-3)
    assert done.layers[0].kept and done.gain > 1.05


def test_what_brings_the_outputs_no_nearer_is_put_back() -> None:
    model, small, data = two_networks()
    before = copy.deepcopy(small.state_dict())
    done = recover_blocks(small, model, data, ["blocks.0"], learning_rate=0.0)
    assert not done.layers[0].kept and done.gain == 1
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())


def test_a_convolution_of_a_real_plan() -> None:
    model, data = make_model(), make_data()
    plan = rankfold.analyze(model, data, metric="weight").plan(macs=0.4)
    small = rankfold.factorize(model, plan)
    names = [entry.name for entry in plan.factorized]
    assert recover_blocks(small, model, data, names, epochs=4).gain > 1.02


def test_blocks_that_are_not_there_or_called_often_are_refused() -> None:
    model, small, data = two_networks()
    with pytest.raises(ModelError, match=r"no block 'blocks\.2'"):
        recover_blocks(small, model, data, ["blocks.2"])
    model.blocks[1] = model.blocks[0]
    small.blocks[1] = small.blocks[0]
    with pytest.raises(ModelError, match="called 2 times"):
        recover_blocks(small, model, data, ["blocks.0"])
