import pytest
import torch
from torch import nn

from rankfold.analysis.calibration import Calibration, calibrate
from rankfold.batches import Data, run
from rankfold.progress import silent


def calibrated(data: Data) -> Calibration:
    layer = nn.Linear(1, 1)
    return calibrate(
        layer,
        data,
        {"": layer},
        forward=run,
        outputs="values",
        loss_fn=None,
        temperatures=(),
        batches=8,
        held_out=2,
        seed=0,
        progress=silent,
    )


def numbered(count: int) -> list[torch.Tensor]:
    return [torch.full((2, 1), float(index)) for index in range(count)]


def test_moments_are_of_the_batches_that_do_not_judge() -> None:
    found = calibrated(numbered(80))
    judging = [batch[0, 0].item() for batch in found.judge.batches]
    assert judging == [16, 56]  # of 0, 8, ..., 72
    mean_square = sum(number**2 for number in (0, 8, 24, 32, 40, 48, 64, 72)) / 8
    assert found.statistics[""].inputs.item() == pytest.approx(mean_square)


def test_passes_are_counted() -> None:
    assert calibrated(numbered(10)).passes == 8 * 2
