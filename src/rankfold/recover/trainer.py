"""Optimizer, schedule and loop of a recovery, by one process or several (Accelerate)."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rankfold import processes
from rankfold.batches import Data, device_of, running
from rankfold.errors import CalibrationError, RankfoldError
from rankfold.progress import Progress
from rankfold.recover.objective import Objective, Penalty
from rankfold.recover.sharded import (
    device_for_shares,
    in_shares,
    put_together,
    spread,
    state_of_shares,
    whole_state,
)

Schedule = Literal["cosine", "step"]
Precision = Literal["float32", "bfloat16", "float16"]
BeforeStep = Callable[[nn.Module, int], None]  # (model, number of the step)
AfterStep = Callable[[nn.Module, float], None]  # (model, learning rate of the step)
Log = Callable[[str, float, int], None]  # (what, value, number of the step)

PRECISIONS: dict[str, torch.dtype | None] = {
    "float32": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_NOISY = (_BatchNorm, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


class Trainer:
    """Adam on the parameters of a model that require gradients.

    A step takes `accumulation` batches from each process. Where there are several, each trains a
    replica, or with `shares` a share of every weight; the model itself is then brought up to date
    by `collect`, after every epoch.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        learning_rate: float,
        schedule: Callable[[int], float],
        *,
        accumulation: int = 1,
        penalty: Penalty | None = None,
        before_step: BeforeStep | None = None,
        after_step: AfterStep | None = None,
        log: Log | None = None,
        shares: bool = False,
    ) -> None:
        self.shares = shares and processes.count() > 1
        device = device_for_shares(device_of(model)) if self.shares else device_of(model)
        trained = in_shares(model, device) if self.shares else model
        parameters = [p for p in trained.parameters() if p.requires_grad]
        if not parameters:
            raise RankfoldError("the model has no parameter that requires a gradient")
        self.accelerator = _accelerator(device) if processes.count() > 1 else None
        self.model, self.objective, self.accumulation = model, objective, accumulation
        self.penalty, self.before_step, self.after_step = penalty, before_step, after_step
        self.log = log
        self.scaler = torch.amp.GradScaler(device.type, enabled=objective.autocast is torch.float16)
        optimizer = torch.optim.Adam(parameters, learning_rate)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        self.prepared = trained
        if self.accelerator is not None and not self.shares:
            self.prepared = self.accelerator.prepare_model(model)
        self.optimizer = optimizer

    @property
    def batches_per_step(self) -> int:
        """Of all processes together."""
        return self.accumulation * processes.count()

    def epoch(
        self, data: Data, batches: int, seed: int, progress: Progress, description: str
    ) -> float:
        """One pass over the data in the order that the seed gives; the mean loss of all batches."""
        losses: list[float] = []
        trained = self.prepared if self.shares else self.model
        with torch.random.fork_rng(), running(trained, train=True):
            torch.manual_seed(seed)
            if self.objective.loss_fn is None:
                # A teacher is matched output for output: the noise of dropout and of batch
                # statistics only blurs that.
                for module in trained.modules():
                    module.training &= not isinstance(module, _NOISY)
            shuffled = progress(_shuffled(data), description, batches)
            for group in _groups(shuffled, self.batches_per_step):
                losses.append(self._step(processes.own(group)))
                if not math.isfinite(losses[-1]):
                    return losses[-1]
        if not losses:
            raise CalibrationError("the data yields no batch")
        return sum(losses) / len(losses)

    def _step(self, batches: list[tuple[int, Any, bool]]) -> float:
        """One step of the optimizer; the mean loss of all processes' batches."""
        step = self.schedule.last_epoch
        if self.before_step is not None:
            self.before_step(self.model, step)
        losses = []
        for place, (index, batch, kept) in enumerate(batches):
            with self._together(last=place == len(batches) - 1):
                loss = self.objective(self.prepared, batch, index, kept)
                losses.append(loss.detach())
                if self.penalty is not None:
                    loss = loss + self.penalty(self.model)
                if math.isfinite(loss.item()):
                    self.scaler.scale(loss / len(batches)).backward()
        mean = processes.mean(torch.stack(losses).mean().item())
        if not math.isfinite(mean):
            return mean
        self.scaler.unscale_(self.optimizer)
        by: Any = nn.utils if self.accelerator is None else self.accelerator
        by.clip_grad_norm_(self.prepared.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        rate = float(self.schedule.get_last_lr()[0])
        if self.after_step is not None:
            with torch.no_grad():
                self.after_step(self.model, rate)
        self.schedule.step()
        self.optimizer.zero_grad()
        if self.log is not None:
            self.log("loss", mean, step)
            self.log("learning rate", rate, step)
        return mean

    def _together(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients are averaged over processes after the last batch of a step alone."""
        if self.shares:
            self.prepared.set_requires_gradient_sync(last)  # type: ignore[operator]
            return nullcontext()
        if last or self.accelerator is None:
            return nullcontext()
        return self.accelerator.no_sync(self.prepared)

    def distribute(self) -> None:
        """Train on from what the model's weights are now."""
        if self.shares:
            spread(self.model, self.prepared)

    def collect(self) -> None:
        """Bring the model up to date."""
        if self.shares:
            put_together(self.prepared, self.model)

    def mean_loss(self, data: Data, progress: Progress) -> float:
        """Over the data, in eval mode; what the first process finds, for all."""
        if self.shares:  # which takes all of them
            return processes.gathered(self.objective.mean(self.prepared, data, progress))[0]
        return processes.from_first(lambda: self.objective.mean(self.model, data, progress))

    def state_dict(self) -> dict[str, Any]:
        """All but the weights, on which all processes have to work together."""
        state = self.optimizer.state_dict()
        return {
            "optimizer": whole_state(state) if self.shares else state,
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Of the same optimizer and schedule."""
        known = state["optimizer"]
        self.optimizer.load_state_dict(
            state_of_shares(known, self.optimizer) if self.shares else known
        )
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])


def _accelerator(device: torch.device) -> Any:
    """Of several processes; one has no need of it, and would be held to one kind of device."""
    # Importing Accelerate takes a second, which only such training should pay.
    from accelerate import Accelerator

    # Precision is this loop's own business: Accelerate would change the model's forward.
    return Accelerator(cpu=device.type == "cpu", mixed_precision="no")


def make_schedule(name: Schedule, steps: int) -> Callable[[int], float]:
    """The learning rate of each of so many steps, relative to the greatest."""
    if name not in SCHEDULES:
        raise RankfoldError(f"no schedule '{name}'; there are {', '.join(SCHEDULES)}")
    return partial(SCHEDULES[name], steps)


def _cosine(steps: int, step: int) -> float:
    """Linear warm-up over 5 %, then cosine to zero."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def _step(steps: int, step: int) -> float:
    """Divided by 10 after 1/2 and after 3/4."""
    return 0.1 ** ((step >= steps / 2) + (step >= steps * 3 / 4))


SCHEDULES: dict[str, Callable[[int, int], float]] = {"cosine": _cosine, "step": _step}


def _shuffled(data: Data) -> Iterator[tuple[int, Any, bool]]:
    """Index, batch and whether it is the same object every epoch; lists in random order."""
    if isinstance(data, list | tuple):
        for index in torch.randperm(len(data)).tolist():
            yield index, data[index], True
    else:
        for index, batch in enumerate(data):
            yield index, batch, False


def _groups(batches: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """So many at a time; the last group filled up from the first batches."""
    first: list[Any] = []
    group: list[Any] = []
    for batch in batches:
        if len(first) < size:
            first.append(batch)
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        filled = [first[place % len(first)] for place in range(size - len(group))]
        yield group + filled
