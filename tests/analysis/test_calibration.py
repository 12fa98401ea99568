import pytest
import torch
from torch import nn

from rankfold.analysis.calibration import Calibration, calibrate
from rankfold.batches import Data, run
from rankfold.progress import silent


class Once:
    """Batches that can be read from the start alone."""

    def __init__(self, batches: list[torch.Tensor]) -> None:
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def calibrated(data: Data, batches: int = 8, held_out: int = 2) -> Calibration:
    layer = nn.Linear(1, 1)
    return calibrate(
        layer,
        data,
        {"": layer},
        forward=run,
        outputs="values",
        loss_fn=None,
        temperatures=(),
        batches=batches,
        held_out=held_out,
        seed=0,
        progress=silent,
    )


def numbered(count: int) -> list[torch.Tensor]:
    return [torch.full((2, 1), float(index)) for index in range(count)]


def held(found: Calibration) -> list[float]:
    return [batch[0, 0].item() for batch in found.judge.batches]


def test_of_a_sequence_batches_come_from_all_over_it() -> None:
    found = calibrated(numbered(80))
    assert held(found) == [16, 56]  # of 0, 8, ..., 72
    mean_square = sum(number**2 for number in (0, 8, 24, 32, 40, 48, 64, 72)) / 8
    assert found.statistics[""].inputs.item() == pytest.approx(mean_square)


def test_of_other_data_batches_are_the_first() -> None:
    found = calibrated(Once(numbered(80)))
    assert held(found) == [0, 1]
    mean_square = sum(number**2 for number in range(2, 10)) / 8
    assert found.statistics[""].inputs.item() == pytest.approx(mean_square)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9, 10, 11, 20])
def test_few_batches_are_all_used_and_none_twice(count) -> None:
    found = calibrated(numbered(count))
    there = min(count, 10)
    kept = min(2, max(1, there // 5))
    assert len(set(held(found))) == len(held(found)) == kept
    total = found.statistics[""].inputs.item() * max(1, there - kept)
    if 2 <= count <= 10:
        known = sum(number**2 for number in held(found))
        assert total + known == pytest.approx(sum(number**2 for number in range(count)))


def test_passes_are_counted() -> None:
    assert calibrated(numbered(10)).passes == 8 * 2
