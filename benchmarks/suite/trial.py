"""One contender on one network, at all shares that it is asked for, in a process of its own."""

import resource
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from paired import paired_times
from race import machine
from torch import nn

import rankfold
from rankfold.batches import run
from rankfold.cost import count_macs, count_parameters
from rankfold.errors import RankfoldError
from rankfold.measure import latencies
from rankfold.runtime import FileNetwork
from suite import cases, contenders
from suite.case import Case
from suite.contenders import Contender

REPEATS = 3  # of the timing


@dataclass(frozen=True)
class Trial:
    case: str
    contender: str
    shares: tuple[float, ...]
    epochs: int | None = None  # of recovery; None: as many as the case says

    def about(self, share: float) -> dict[str, Any]:
        return {"case": self.case, "contender": self.contender, "share": share}


def tried(trial: Trial, threads: int) -> Iterator[dict[str, Any]]:
    """All that is measured at each share, or why nothing is.

    What a contender keeps of its own accord from one share to the next, it need not do again.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    contender = contenders.find(trial.contender)
    if isinstance(contender, str):
        yield from ({**trial.about(share), "why not": contender} for share in trial.shares)
        return
    case = cases.make(trial.case)
    model = case.make_model().eval()
    of_all = {"network": case.name, "unit": case.unit, "point": case.point}
    of_all |= {"title": contender.name, "lines": contender.lines, "packages": contender.packages}
    of_all |= {"machine": machine()}
    if (reason := contender.why_not(model)) is not None:
        yield from ({**trial.about(one), **of_all, "why not": reason} for one in trial.shares)
        return
    of_all |= {"dense": case.score(model)}
    first = True
    for share in trial.shares:
        about = {**trial.about(share), **of_all}
        epochs = trial.epochs or case.epochs
        try:
            yield about | _measured(contender, case, model, share, epochs, first)
            first = False
        except RankfoldError as error:
            yield {**about, "why not": str(error)}


def _measured(
    contender: Contender, case: Case, model: nn.Module, share: float, epochs: int, first: bool
) -> dict[str, Any]:
    """Of all but the first share no peak of memory, which does not come down, and no export."""
    batch = case.data[0]
    before_memory = _peak_memory()
    start = time.perf_counter()
    small = contender.compress(case, share).eval()
    seconds = time.perf_counter() - start
    memory = _peak_memory() - before_memory
    shares = _shares(model, small, batch)
    factorized = case.score(small)
    start = time.perf_counter()
    if contender.trained:
        rankfold.recover(
            small,
            case.training,
            teacher=model,
            distance=case.distance,
            validation=case.validation,
            metric=case.agreement,
            epochs=epochs,
            learning_rate=case.learning_rate,
        )
    recovering = time.perf_counter() - start
    before_memory = _peak_memory()
    start = time.perf_counter()
    small = contender.finish(small.eval(), case)
    seconds += time.perf_counter() - start
    memory += _peak_memory() - before_memory
    beside = contender.baseline(model, case)
    pairs = [_times(beside, small, batch) for _ in range(REPEATS)]
    return {
        "parameters kept": shares[0],
        "MACs kept": shares[1],
        "seconds to compress": seconds,
        "memory to compress": memory if first else None,
        "factorized": factorized,
        "recovered": case.score(small),
        "seconds to recover": recovering,
        "epochs": epochs if contender.trained else 0,
        "dense ms": [dense for dense, _ in pairs],
        "small ms": [ours for _, ours in pairs],
        "time kept": statistics.median(ours / dense for dense, ours in pairs),
        "exported": _is_exported(small, batch) if first else None,
    }


def _shares(model: nn.Module, small: nn.Module, batch: Any) -> tuple[float, float]:
    """Of the dense network's parameters and MACs."""
    dense, ours = (
        (count_parameters(one), count_macs(lambda one=one: run(one, batch)))
        for one in (model, small)
    )
    return ours[0] / dense[0], ours[1] / dense[1]


def _times(dense: nn.Module, small: nn.Module, batch: Any) -> Sequence[float]:
    """Milliseconds of both in turns; files run by another runtime have no memory format to try."""
    if not isinstance(small, FileNetwork):
        return paired_times(dense, small, batch)
    calls = [lambda m=one: run(m, batch) for one in (dense, small)]
    return latencies(calls, torch.device("cpu"), seconds=1.0)


def _peak_memory() -> int:
    """Of this process so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _is_exported(small: nn.Module, batch: Any) -> bool:
    """Whether an ONNX file of it gives the same outputs where its code is not known."""
    if isinstance(small, FileNetwork):
        return True
    with tempfile.TemporaryDirectory() as folder:
        try:
            rankfold.export(small, Path(folder, "small.onnx"), batch)
        except RankfoldError:
            return False
    return True
