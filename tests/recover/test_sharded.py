"""Shares of a network, of one process alone; those of two are in `test_processes.py`."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from rankfold.recover.sharded import in_shares, put_together, spread, state_of_shares, whole_state


class Lists(nn.Module):
    """Layers in a list of lists, in a dictionary and in a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.pairs = nn.ModuleList(
            nn.ModuleList([nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU())])
            for _ in range(2)
        )
        self.ends = nn.ModuleDict({"norm": nn.BatchNorm1d(8), "head": nn.Linear(8, 3)})

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = self.stem(tensor)
        for first, second in self.pairs:
            tensor = tensor + second(first(tensor))
        return self.ends["head"](self.ends["norm"](tensor))


@pytest.fixture
def alone():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def same(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_every_weight_is_shared_out_and_comes_back(alone) -> None:
    model = Lists().eval()
    network = in_shares(model, torch.device("cpu"))
    assert all(isinstance(parameter, DTensor) for parameter in network.parameters())
    given = torch.randn(5, 6)
    with torch.no_grad():
        torch.testing.assert_close(network(given), model(given))
        # The pass has left the outermost layers put together.
        other = copy.deepcopy(model)
        for parameter in other.parameters():
            parameter.zero_()
        put_together(network, other)
        assert same(other, model)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(1)
        spread(model, network)
        torch.testing.assert_close(network(given), model(given))
    put_together(network, other)
    assert same(other, model)


def test_the_state_of_an_optimizer_survives(alone) -> None:
    network = in_shares(Lists(), torch.device("cpu"))
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    network(torch.randn(5, 6)).square().sum().backward()
    optimizer.step()
    state = whole_state(optimizer.state_dict())
    flat = [one for entry in state["state"].values() for one in entry.values()]
    assert flat and not any(isinstance(one, DTensor) for one in flat)
    other = torch.optim.Adam(network.parameters(), 1e-2)
    other.load_state_dict(state_of_shares(state, other))
    again = whole_state(other.state_dict())
    for place, entry in state["state"].items():
        for name, value in entry.items():
            assert torch.equal(again["state"][place][name], value)
    assert isinstance(other.state_dict()["state"][0]["exp_avg"], DTensor)
