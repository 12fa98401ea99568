import torch
from torch import nn

from rankfold.analysis import alone
from rankfold.analysis.alone import filled, milliseconds


class Slow(nn.Module):
    """Every call by another so many milliseconds."""

    def __init__(self, clock: list[float], milliseconds: list[float]) -> None:
        super().__init__()
        self.clock, self.milliseconds, self.calls = clock, milliseconds, 0

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        self.clock[0] += 1e-3 * self.milliseconds[self.calls % len(self.milliseconds)]
        self.calls += 1
        return given


def test_what_else_the_machine_does_is_not_counted(monkeypatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(alone, "mark", lambda device: clock[0])
    layer = Slow(clock, [4, 2, 2, 9])
    assert abs(milliseconds(layer, torch.zeros(1)) - 2) < 1e-6


def test_a_layer_runs_often_enough_and_not_for_ever(monkeypatch) -> None:
    for each, runs in ((1e-3, 60), (4, 10), (1000, 5)):
        clock = [0.0]
        monkeypatch.setattr(alone, "mark", lambda device, clock=clock: clock[0])
        layer = Slow(clock, [each])
        milliseconds(layer, torch.zeros(1))
        assert layer.calls in (2 + runs, 3 + runs)


def test_a_filled_copy_has_weights_of_its_own() -> None:
    layer = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    copy = filled(layer.to("meta"), torch.device("cpu"))
    assert not copy.training
    assert {name: value.shape for name, value in copy.state_dict().items()} == {
        name: value.shape for name, value in before.items()
    }
    assert copy[0].weight.abs().max() <= 0.5 and copy[0].weight.std() > 0.1
    assert not copy[1].running_mean.any()
