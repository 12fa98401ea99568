"""Training a factorized model until it does what the original did."""

import hashlib
import math
import os
import time
from collections.abc import Sequence, Sized
from pathlib import Path

from torch import nn

from rankfold import processes
from rankfold.batches import Data, Forward, check_data, device_of, run
from rankfold.distances import Distance, SquaredError
from rankfold.errors import RankfoldError
from rankfold.fingerprint import weights_sha256
from rankfold.layers import balance_factors
from rankfold.measure import Metric, evaluate
from rankfold.progress import Progress, silent
from rankfold.recover.batch_norm import reestimate_batch_norm
from rankfold.recover.logging import tensorboard_log
from rankfold.recover.objective import CACHE_BYTES, LossFunction, Objective, Penalty
from rankfold.recover.sharded import device_for_shares, in_shares
from rankfold.recover.state import KEPT, Epoch, Keep, Recovery, State, resume, write
from rankfold.recover.trainer import (
    PRECISIONS,
    AfterStep,
    BeforeStep,
    Precision,
    Schedule,
    Trainer,
    make_schedule,
)

Pathlike = str | os.PathLike[str]


def recover(
    model: nn.Module,
    data: Data,
    *,
    teacher: nn.Module | None = None,
    distance: Distance = SquaredError(),  # noqa: B008  (frozen)
    features: Sequence[str] = (),
    loss_fn: LossFunction | None = None,
    penalty: Penalty | None = None,
    validation: Data | None = None,
    metric: Metric | None = None,
    forward: Forward = run,
    epochs: int = 5,
    learning_rate: float = 3e-4,
    schedule: Schedule = "cosine",
    patience: int = 3,
    keep: Keep = "best",
    accumulation: int = 1,
    precision: Precision = "float32",
    before_step: BeforeStep | None = None,
    after_step: AfterStep | None = None,
    checkpoint: Pathlike | None = None,
    tensorboard: Pathlike | None = None,
    sharded: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> Recovery:
    """Train a factorized model in place until it does what the original did.

    Without labels: `teacher` is the original, and the loss is the `distance` of the outputs from
    the teacher's (`rankfold.distances`): their mean squared difference relative to the variance of
    the teacher's, or another. `features` names modules whose outputs are matched too, by their
    squared difference. With labels: `loss_fn(output, label)`. With both, their sum; and
    `penalty(model)`, if there is one.

    Adam, with the learning rate warmed up over the first 5 % of the steps and then a cosine to
    zero, or divided by 10 after each half and three quarters of the epochs (`schedule="step"`, as
    Kim et al. 2016 do). No weight decay: of factors it is a pull to fewer ranks, not to smaller
    weights (`rankfold.training` has what decays the product). A step takes `accumulation` batches;
    `precision` is that of the model's forward pass, weights and losses stay float32. `before_step`
    is called with the model and the number of the step, `after_step` with the model and the
    learning rate, without gradients.

    Started by `accelerate launch` or `torchrun`, processes share the work: a step takes so many
    batches of each of them, and what comes out is what one process makes of so many times the
    `accumulation`. Each trains a replica; with `sharded` it holds a share of every weight of the
    model and of the teacher (torch's FSDP), for networks that are larger than a device: keep these
    on the CPU, where the model is brought up to date after every epoch. A `metric` scores it there;
    penalties and what is called between steps know whole weights, and are refused.

    First the factors of a layer are brought to one scale (`balance_factors`), and the batch-norm
    statistics are re-estimated, unless the score falls by it. After every epoch the model is scored
    on `validation`: by `metric(model, validation)`, higher is better, or by the negative loss. A
    list of ten batches or more without a `validation` of its own gives every tenth batch to it. The
    weights with the best score are kept, those before training included; training ends early
    after `patience` epochs without a better one. Without any validation data, or with
    `keep="last"`, for a training that is not after the score alone, the last are kept, and all
    epochs done.

    `checkpoint` names a file that is written after every epoch; if it is there at the start and is
    of the same run, training goes on from it, to the same result as without the interruption.
    `tensorboard` names a directory for losses, scores and learning rates.

    Raises CalibrationError for data that yields nothing or holds NaN, ModelError for a model that
    does not run, CheckpointError for a checkpoint of another run.
    """
    if teacher is None and loss_fn is None:
        raise RankfoldError("recovery needs a teacher (no labels) or a loss_fn (labels)")
    if precision not in PRECISIONS:
        raise RankfoldError(f"no precision '{precision}'; there are {', '.join(PRECISIONS)}")
    if type(accumulation) is not int or accumulation < 1:
        raise RankfoldError(f"accumulation={accumulation} is a number of batches, at least 1")
    if sharded and not (penalty is before_step is after_step is None):
        raise RankfoldError("a penalty, before_step and after_step need whole weights: not sharded")
    if keep not in KEPT:
        raise RankfoldError(f"keep='{keep}': there are {', '.join(KEPT)}")
    start = time.perf_counter()
    check_data(data)
    device = device_of(model)
    processes.join(device_for_shares(device) if sharded else device)
    if validation is None:
        data, validation = hold_out(data)
    if sharded and teacher is not None and processes.count() > 1:
        teacher = in_shares(teacher, device_for_shares(device))
    autocast, cache_bytes = PRECISIONS[precision], 0 if sharded else CACHE_BYTES
    objective = Objective(teacher, distance, loss_fn, forward, features, autocast, cache_bytes)

    batches = len(data) if isinstance(data, Sized) else sum(1 for _ in data)
    group = accumulation * processes.count()
    steps = math.ceil(batches / group)
    settings = (
        *(epochs, learning_rate, schedule, patience, seed, batches, _name_of(distance)),
        *(group, precision, tuple(features), _name_of(penalty), keep),
    )
    run_name = hashlib.sha256(f"{settings} {weights_sha256(model)}".encode()).hexdigest()
    log = None if tensorboard is None else tensorboard_log(tensorboard)
    trainer = Trainer(
        model,
        objective,
        learning_rate,
        make_schedule(schedule, epochs * steps),
        accumulation=accumulation,
        penalty=penalty,
        before_step=before_step,
        after_step=after_step,
        log=log,
        shares=sharded,
    )

    def score() -> float | None:
        if validation is None:
            return None
        if metric is not None:
            return evaluate(metric, model, validation)
        return -trainer.mean_loss(validation, progress)

    state = State(model, score(), keep)
    balance_factors(model)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    reestimate_batch_norm(model, data, forward=forward, progress=progress)
    trainer.distribute()
    first = score()
    if first is not None and first < state.best_score:
        # Not all networks have statistics of such data.
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])
        trainer.distribute()
        first = state.best_score
    state.add(Epoch(0, None, first), model)
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.exists():
        resume(path, run_name, state, trainer)
    ended = "all epochs done"
    for index in range(len(state.history), epochs + 1):
        if state.epochs_since_best >= patience:
            ended = f"no better score for {patience} epochs"
            break
        description = f"recovering, epoch {index}{_told(state.history[-1].score)}"
        loss = trainer.epoch(data, batches, seed + index, progress, description)
        trainer.collect()
        if not math.isfinite(loss):
            ended = f"the loss became {loss} in epoch {index}"
            break
        state.add(Epoch(index, loss, score()), model)
        if log is not None and state.history[-1].score is not None:
            log("score", state.history[-1].score, index * steps)
        if path is not None:
            write(path, run_name, state, trainer)
    model.load_state_dict(state.weights)
    return Recovery(tuple(state.history), state.best, ended, time.perf_counter() - start)


def _name_of(setting: Distance | Penalty | None) -> str:
    return getattr(setting, "__qualname__", repr(setting))


def _told(score: float | None) -> str:
    return "" if score is None else f", score {score:.4g}"


def hold_out(data: Data) -> tuple[Data, Data | None]:
    """Every tenth batch of a list of ten or more is for validation, the rest for training."""
    if not isinstance(data, list | tuple) or len(data) < 10:
        return data, None
    return [b for i, b in enumerate(data) if i % 10 != 9], data[9::10]
