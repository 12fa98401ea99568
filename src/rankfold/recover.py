"""Bringing accuracy back after factorization, with labels or without."""

import copy
import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sized
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rankfold.batches import (
    Data,
    Forward,
    all_finite,
    check_data,
    device_of,
    first_batches,
    run,
    run_or_explain,
    running,
    split_batch,
    tensors_of,
    to_device,
)
from rankfold.distances import Distance, SquaredError
from rankfold.errors import CalibrationError, CheckpointError, RankfoldError
from rankfold.fingerprint import weights_sha256
from rankfold.measure import Metric, evaluate
from rankfold.progress import Progress, silent

Schedule = Literal["cosine", "step"]
LossFunction = Callable[[Any, Any], torch.Tensor]  # (output, label) -> scalar

_CACHE_BYTES = 1 << 30  # of the teacher's outputs, kept over epochs when the data is a sequence
_BATCH_NORM_BATCHES = 100


@dataclass(frozen=True)
class Epoch:
    """One pass over the data. Epoch 0 is before the first."""

    index: int
    loss: float | None  # mean over training batches; None for epoch 0
    score: float | None  # on the validation data, higher is better; None without such data


@dataclass(frozen=True)
class Recovery:
    """What a recovery did: its epochs, which of them the model holds now, and why it ended."""

    epochs: tuple[Epoch, ...]
    best: int
    ended: str
    seconds: float


def recover(
    model: nn.Module,
    data: Data,
    *,
    teacher: nn.Module | None = None,
    distance: Distance = SquaredError(),  # noqa: B008  (frozen)
    loss_fn: LossFunction | None = None,
    validation: Data | None = None,
    metric: Metric | None = None,
    forward: Forward = run,
    epochs: int = 5,
    learning_rate: float = 3e-4,
    schedule: Schedule = "cosine",
    patience: int = 3,
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Recovery:
    """Train a factorized model in place until it does what the original did.

    Without labels: `teacher` is the original, and the loss is the `distance` of the outputs from
    the teacher's (`rankfold.distances`): their mean squared difference relative to the variance of
    the teacher's, or another. With labels: `loss_fn(output, label)`. With both, their sum.

    Adam, with the learning rate warmed up over the first 5 % of the steps and then a cosine to
    zero, or divided by 10 after each half and three quarters of the epochs (`schedule="step"`, as
    Kim et al. 2016 do).

    First the batch-norm statistics are re-estimated. After every epoch the model is scored on
    `validation`: by `metric(model, validation)`, higher is better, or by the negative loss. A list
    of ten batches or more without a `validation` of its own gives every tenth batch to it. The
    weights with the best score are kept, those before training included; training ends early
    after `patience` epochs without a better one. Without any validation data the last are kept.

    `checkpoint` names a file that is written after every epoch; if it is there at the start and is
    of the same run, training goes on from it, to the same result as without the interruption.

    Raises CalibrationError for data that yields nothing or holds NaN, ModelError for a model that
    does not run, CheckpointError for a checkpoint of another run.
    """
    if teacher is None and loss_fn is None:
        raise RankfoldError("recovery needs a teacher (no labels) or a loss_fn (labels)")
    if schedule not in _SCHEDULES:
        raise RankfoldError(f"no schedule '{schedule}'; there are {', '.join(_SCHEDULES)}")
    start = time.perf_counter()
    check_data(data)
    if validation is None:
        data, validation = _hold_out(data)
    objective = _Objective(teacher, distance, loss_fn, forward)

    def score() -> float | None:
        if validation is None:
            return None
        if metric is not None:
            return evaluate(metric, model, validation)
        return -objective.mean(model, validation, progress)

    path = None if checkpoint is None else Path(checkpoint)
    steps = len(data) if isinstance(data, Sized) else sum(1 for _ in data)
    settings = (epochs, learning_rate, schedule, patience, seed, steps, _name_of(distance))
    run_name = hashlib.sha256(f"{settings} {weights_sha256(model)}".encode()).hexdigest()
    trainer = _Trainer(
        model, objective, learning_rate, partial(_SCHEDULES[schedule], epochs * steps)
    )
    state = _State(model, score())
    reestimate_batch_norm(model, data, forward=forward, progress=progress)
    state.add(Epoch(0, None, score()), model)
    if path is not None and path.exists():
        _resume(path, run_name, state, trainer)
    ended = "all epochs done"
    for index in range(len(state.history), epochs + 1):
        if state.epochs_since_best >= patience:
            ended = f"no better score for {patience} epochs"
            break
        loss = trainer.epoch(data, steps, seed + index, progress, f"recovering, epoch {index}")
        if not math.isfinite(loss):
            ended = f"the loss became {loss} in epoch {index}"
            break
        state.add(Epoch(index, loss, score()), model)
        if path is not None:
            _write(path, run_name, state, trainer)
    model.load_state_dict(state.weights)
    return Recovery(tuple(state.history), state.best, ended, time.perf_counter() - start)


def _name_of(distance: Distance) -> str:
    return getattr(distance, "__qualname__", repr(distance))


def reestimate_batch_norm(
    model: nn.Module, data: Data, *, forward: Forward = run, progress: Progress = silent
) -> None:
    """Replace running means and variances by those of the first 100 batches, in place.

    Factorization shifts what the batch norms after it see. Everything else runs in eval mode; a
    model without batch norm is left as it is. Raises CalibrationError for data that yields nothing.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    with running(model), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over batches
            norm.train()
        found = first_batches(data, _BATCH_NORM_BATCHES, device_of(model))
        for index, batch in enumerate(progress(found, "re-estimating batch norm")):
            run_or_explain(forward, model, batch, index)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _cosine(steps: int, step: int) -> float:
    """Learning rate, relative to the greatest: linear warm-up over 5 %, then cosine to zero."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def _step(steps: int, step: int) -> float:
    """Learning rate, relative to the greatest: divided by 10 after 1/2 and after 3/4."""
    return 0.1 ** ((step >= steps / 2) + (step >= steps * 3 / 4))


_SCHEDULES = {"cosine": _cosine, "step": _step}


def _hold_out(data: Data) -> tuple[Data, Data | None]:
    """Every tenth batch of a list of ten or more is for validation, the rest for training."""
    if not isinstance(data, list | tuple) or len(data) < 10:
        return data, None
    return [b for i, b in enumerate(data) if i % 10 != 9], data[9::10]


class _Objective:
    """The training loss of one batch; the teacher's outputs are computed once where they can be."""

    def __init__(
        self,
        teacher: nn.Module | None,
        distance: Distance,
        loss_fn: LossFunction | None,
        forward: Forward,
    ) -> None:
        self.teacher, self.distance = teacher, distance
        self.loss_fn, self.forward = loss_fn, forward
        self.cache: dict[int, tuple[Any, Any]] = {}  # id of a batch: the batch, the output
        self.cached_bytes = 0

    def __call__(self, model: nn.Module, batch: Any, index: int, kept: bool) -> torch.Tensor:
        """The loss; `kept` says that the caller holds this batch and will come with it again."""
        device = device_of(model)
        moved = to_device(batch, device)
        output = run_or_explain(self.forward, model, moved, index)
        loss = torch.zeros((), device=device)
        if self.loss_fn is not None:
            loss = loss + self._on_labels(output, split_batch(moved)[1], index)
        if self.teacher is not None:
            loss = loss + self.distance(output, self._target(batch, moved, index, kept))
        if not torch.isfinite(loss) and not all_finite(moved):
            raise CalibrationError(f"batch {index} of the data holds NaN or infinity")
        return loss

    def _on_labels(self, output: Any, labels: Any, index: int) -> torch.Tensor:
        if labels is None:
            raise CalibrationError(
                f"batch {index} has no label for the loss function: give (input, label) batches"
            )
        assert self.loss_fn is not None
        try:
            return self.loss_fn(output, labels)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            message = (str(error) or type(error).__name__).splitlines()[0]
            raise RankfoldError(f"the loss function fails on batch {index}: {message}") from error

    def _target(self, batch: Any, moved: Any, index: int, kept: bool) -> Any:
        if kept and id(batch) in self.cache:
            return self.cache[id(batch)][1]
        assert self.teacher is not None
        with running(self.teacher), torch.no_grad():
            target = run_or_explain(self.forward, self.teacher, moved, index)
        size = sum(tensor.nbytes for tensor in tensors_of(target))
        if kept and self.cached_bytes + size <= _CACHE_BYTES:
            self.cached_bytes += size
            self.cache[id(batch)] = (batch, target)
        return target

    def mean(self, model: nn.Module, data: Data, progress: Progress) -> float:
        """The mean loss over the data, in eval mode."""
        kept = isinstance(data, list | tuple)
        with running(model), torch.no_grad():
            batches = enumerate(progress(data, "validating"))
            losses = [self(model, batch, index, kept).item() for index, batch in batches]
        if not losses:
            raise CalibrationError("the validation data yields no batch")
        return sum(losses) / len(losses)


class _Trainer:
    """Optimizer, schedule and loop, on Accelerate."""

    def __init__(
        self,
        model: nn.Module,
        objective: _Objective,
        learning_rate: float,
        schedule: Callable[[int], float],
    ) -> None:
        # Importing Accelerate takes a second, which only training should pay.
        from accelerate import Accelerator

        parameters = [p for p in model.parameters() if p.requires_grad]
        if not parameters:
            raise RankfoldError("the model has no parameter that requires a gradient")
        self.accelerator = Accelerator(cpu=device_of(model).type == "cpu")
        self.model, self.objective = model, objective
        optimizer = torch.optim.Adam(parameters, learning_rate)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        self.prepared, self.optimizer = self.accelerator.prepare(model, optimizer)

    def epoch(
        self, data: Data, steps: int, seed: int, progress: Progress, description: str
    ) -> float:
        """One pass over the data in the order that the seed gives; the mean loss."""
        losses = []
        with torch.random.fork_rng(), running(self.model, train=True):
            torch.manual_seed(seed)
            if self.objective.loss_fn is None:
                # A teacher is matched output for output: the noise of dropout and of batch
                # statistics only blurs that.
                for module in self.model.modules():
                    module.training &= not isinstance(module, _NOISY)
            for index, batch, kept in progress(_shuffled(data), description, steps):
                loss = self.objective(self.prepared, batch, index, kept)
                losses.append(loss.item())
                if not math.isfinite(losses[-1]):
                    return losses[-1]
                self.accelerator.backward(loss)
                self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
        if not losses:
            raise CalibrationError("the data yields no batch")
        return sum(losses) / len(losses)


_NOISY = (_BatchNorm, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


def _shuffled(data: Data) -> Iterator[tuple[int, Any, bool]]:
    """Index, batch and whether it is the same object every epoch; lists in random order."""
    if isinstance(data, list | tuple):
        for index in torch.randperm(len(data)).tolist():
            yield index, data[index], True
    else:
        for index, batch in enumerate(data):
            yield index, batch, False


class _State:
    """The history of a run, and the best weights met in it."""

    def __init__(self, model: nn.Module, score: float | None) -> None:
        self.history: list[Epoch] = []
        self.best = 0
        self.best_score = -math.inf if score is None else score
        self.weights = copy.deepcopy(model.state_dict())

    def add(self, epoch: Epoch, model: nn.Module) -> None:
        self.history.append(epoch)
        if epoch.score is None or epoch.score > self.best_score:
            self.best = epoch.index
            self.best_score = self.best_score if epoch.score is None else epoch.score
            self.weights = copy.deepcopy(model.state_dict())

    @property
    def epochs_since_best(self) -> int:
        return self.history[-1].index - self.best


def _write(path: Path, run_name: str, state: _State, trainer: _Trainer) -> None:
    """Write the training state, so that a kill leaves this file or the one before."""
    document = {
        "run": run_name,
        "history": [asdict(epoch) for epoch in state.history],
        "best": state.best,
        "best_score": state.best_score,
        "best_weights": state.weights,
        "weights": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "schedule": trainer.schedule.state_dict(),
    }
    partial_path = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(document, partial_path)
        partial_path.replace(path)
    except (OSError, RuntimeError) as error:  # torch's own writer raises the latter
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def _resume(path: Path, run_name: str, state: _State, trainer: _Trainer) -> None:
    """Bring back the state that `_write` wrote; CheckpointError unless it is of this run."""
    try:
        document = torch.load(path, map_location=device_of(trainer.model), weights_only=True)
        if document["run"] != run_name:
            raise CheckpointError(
                f"{path} is of another run (other model, plan or settings): delete it to start anew"
            )
        state.history = [Epoch(**epoch) for epoch in document["history"]]
        state.best, state.best_score = document["best"], document["best_score"]
        state.weights = document["best_weights"]
        trainer.model.load_state_dict(document["weights"])
        trainer.optimizer.load_state_dict(document["optimizer"])
        trainer.schedule.load_state_dict(document["schedule"])
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path} is damaged or no training state: {error}") from error
