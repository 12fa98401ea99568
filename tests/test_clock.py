import time
from itertools import pairwise

import pytest
import torch

from rankfold.clock import mark, seconds_between, wait

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("name", DEVICES)
def test_marks_are_in_order_and_include_what_was_done_in_between(name) -> None:
    device = torch.device(name)
    matrix = torch.randn(256, 256, device=device)
    wait(device)
    begun = time.perf_counter()
    marks = [mark(device)]
    for _ in range(3):
        for _ in range(10):
            matrix = torch.tanh(matrix @ matrix)
        marks.append(mark(device))
    parts = [seconds_between(*pair) for pair in pairwise(marks)]
    whole = seconds_between(marks[0], marks[-1])
    assert all(part > 0 for part in parts)
    assert sum(parts) == pytest.approx(whole, rel=1e-3, abs=1e-5)
    assert whole <= time.perf_counter() - begun + 1e-4
