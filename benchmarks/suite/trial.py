"""One contender on one network at one share, in a process of its own."""

import resource
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from paired import paired_times
from race import machine

import rankfold
from rankfold.batches import run
from rankfold.cost import count_macs, count_parameters
from rankfold.errors import RankfoldError
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
    small = contender.compress(case, trial.share).eval()
    seconds = time.perf_counter() - start
    memory = _peak_memory() - before_memory
    costs = {
        name: (count_parameters(one), count_macs(lambda one=one: run(one, batch)))
        for name, one in (("dense", model), ("small", small))
    }
    factorized = case.score(small)
    start = time.perf_counter()
    recovery = rankfold.recover(
        small,
        case.training,
        teacher=model,
        distance=case.distance,
        epochs=trial.epochs or case.epochs,
        learning_rate=case.learning_rate,
    )
    pairs = [paired_times(model, small.eval(), batch) for _ in range(REPEATS)]
    return {
        **about,
        "parameters kept": costs["small"][0] / costs["dense"][0],
        "MACs kept": costs["small"][1] / costs["dense"][1],
        "seconds to compress": seconds,
        "memory to compress": memory,
        "dense": case.score(model),
        "factorized": factorized,
        "recovered": case.score(small.eval()),
        "seconds to recover": recovery.seconds,
        "epochs": trial.epochs or case.epochs,
        "dense ms": [dense for dense, _ in pairs],
        "small ms": [ours for _, ours in pairs],
        "time kept": statistics.median(ours / dense for dense, ours in pairs),
        "exported": _is_exported(small, batch),
    }


def _peak_memory() -> int:
    """Of this process so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _is_exported(small: torch.nn.Module, batch: Any) -> bool:
    """Whether an ONNX file of it gives the same outputs where its code is not known."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            rankfold.export(small, Path(folder, "small.onnx"), batch)
        except RankfoldError:
            return False
    return True
