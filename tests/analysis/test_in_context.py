import pytest
import torch
from torch import nn

from rankfold.analysis.in_context import relative_in_place, shares_inside

CPU = torch.device("cpu")


class Clock:
    """Time that passes only where a layer says so."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("rankfold.clock.time", clock)
    return clock


class Slow(nn.Module):
    """Takes so many milliseconds, and counts its calls."""

    def __init__(self, clock: Clock, milliseconds: float) -> None:
        super().__init__()
        self.clock, self.milliseconds, self.calls = clock, milliseconds, 0

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.clock.seconds += 1e-3 * self.milliseconds
        return tensor + self.milliseconds


def test_only_these_layers_are_timed_over_all_their_calls(clock) -> None:
    first, second, unused = Slow(clock, 2), Slow(clock, 20), Slow(clock, 1)

    def call() -> torch.Tensor:
        return second(first(first(torch.zeros(1))))

    assert shares_inside([first], call, CPU) == {first: pytest.approx(4 / 24)}
    found = shares_inside([first, second, unused], call, CPU)
    assert found == {first: pytest.approx(4 / 24), second: pytest.approx(20 / 24)}
    assert shares_inside([], call, CPU) == {}
    assert not first._forward_hooks and not first._forward_pre_hooks


def test_forms_get_what_the_layers_get_and_the_network_goes_on_as_it_was(clock) -> None:
    layer, other, form = Slow(clock, 20), Slow(clock, 0), Slow(clock, 2)
    seen, given = [], []
    form.register_forward_pre_hook(lambda module, args: given.append(args[0].item()))

    def call() -> torch.Tensor:
        output = other(layer(torch.ones(1)))
        seen.append(output.item())
        return output

    assert relative_in_place({layer: form}, call, CPU) == {layer: pytest.approx(0.1)}
    assert set(seen) == {21} and set(given) == {1} and form.calls == layer.calls
    assert not layer._forward_hooks and not layer._forward_pre_hooks
    assert relative_in_place({Slow(clock, 1): form}, call, CPU) == {}  # which is never run


def test_a_processor_that_slows_down_changes_nothing(clock) -> None:
    """Every run at another speed: what is compared is taken in the same one."""
    layer, form, runs = Slow(clock, 20), Slow(clock, 2), []

    def call() -> torch.Tensor:
        speed = 1.7 ** (len(runs) % 3)
        runs.append(speed)
        layer.milliseconds, form.milliseconds = 20 * speed, 2 * speed
        clock.seconds += 20e-3 * speed
        return layer(torch.ones(1))

    assert shares_inside([layer], call, CPU) == {layer: pytest.approx(0.5)}
    assert relative_in_place({layer: form}, call, CPU) == {layer: pytest.approx(0.1)}
    assert len(set(runs)) == 3


def test_what_takes_no_time_at_all_counts_as_a_little(clock) -> None:
    layer, form = Slow(clock, 0), Slow(clock, 0)

    def call() -> torch.Tensor:
        return layer(torch.ones(1))

    assert 0 < shares_inside([layer], call, CPU)[layer] <= 1
    assert relative_in_place({layer: form}, call, CPU) == {layer: 1}


def test_hooks_are_removed_where_a_network_fails() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(RuntimeError):
        relative_in_place({layer: layer}, lambda: layer(torch.ones(3)), CPU)
    assert not layer._forward_hooks and not layer._forward_pre_hooks
