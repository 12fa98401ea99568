"""One contender on one network at one share, in a process of its own."""

import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
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

REPEATS = 3  # of the timing


@dataclass(frozen=True)
class Trial:
    case: str
    contender: str
    share: float
    epochs: int | None = None  # of recovery; None: as many as the case says


def tried(trial: Trial, threads: int) -> dict[str, Any]:
    """All that is measured, or why nothing is."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    about = {"case": trial.case, "contender": trial.contender, "share": trial.share}
    contender = contenders.find(trial.contender)
    if isinstance(contender, str):
        return {**about, "why not": contender}
    case = cases.make(trial.case)
    model = case.make_model().eval()
    about |= {"network": case.name, "unit": case.unit, "title": contender.name}
    about |= {"lines": contender.lines, "packages": contender.packages, "machine": machine()}
    if (reason := contender.why_not(model)) is not None:
        return {**about, "why not": reason}
    batch = case.data[0]
    start = time.perf_counter()
    before_memory = _peak_memory()
    try:
        small = contender.compress(case, trial.share).eval()
    except RankfoldError as error:
        return {**about, "why not": str(error)}
    seconds = time.perf_counter() - start
    memory = _peak_memory() - before_memory
    shares = _shares(model, small, batch) if contender.trained else (1.0, 1.0)
    factorized = case.score(small)
    epochs = (trial.epochs or case.epochs) if contender.trained else 0
    start = time.perf_counter()
    if epochs:
        rankfold.recover(
            small,
            case.training,
            teacher=model,
            distance=case.distance,
            epochs=epochs,
            learning_rate=case.learning_rate,
        )
    recovering = time.perf_counter() - start
    beside = contender.baseline(model, case)
    pairs = [_times(beside, small.eval(), batch) for _ in range(REPEATS)]
    return {
        **about,
        "parameters kept": shares[0],
        "MACs kept": shares[1],
        "seconds to compress": seconds,
        "memory to compress": memory,
        "dense": case.score(model),
        "factorized": factorized,
        "recovered": case.score(small.eval()) if epochs else factorized,
        "seconds to recover": recovering,
        "epochs": epochs,
        "dense ms": [dense for dense, _ in pairs],
        "small ms": [ours for _, ours in pairs],
        "time kept": statistics.median(ours / dense for dense, ours in pairs),
        "exported": _is_exported(small, batch) if contender.trained else True,
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
    with tempfile.TemporaryDirectory() as folder:
        try:
            rankfold.export(small, Path(folder, "small.onnx"), batch)
        except RankfoldError:
            return False
    return True
