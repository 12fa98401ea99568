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

    A step takes `accumulation` batches from each process. The model is wrapped as Accelerate was
    configured to (data parallel where there are several processes).
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
    ) -> None:
        # Importing Accelerate takes a second, which only training should pay.
        from accelerate import Accelerator

        parameters = [p for p in model.parameters() if p.requires_grad]
        if not parameters:
            raise RankfoldError("the model has no parameter that requires a gradient")
        device = device_of(model)
        # Precision is this loop's own business: Accelerate would change the model's forward.
        self.accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no")
        self.model, self.objective, self.accumulation = model, objective, accumulation
        self.penalty, self.before_step, self.after_step = penalty, before_step, after_step
        self.log = log
        self.scaler = torch.amp.GradScaler(device.type, enabled=objective.autocast is torch.float16)
        optimizer = torch.optim.Adam(parameters, learning_rate)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
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
        with torch.random.fork_rng(), running(self.model, train=True):
            torch.manual_seed(seed)
            if self.objective.loss_fn is None:
                # A teacher is matched output for output: the noise of dropout and of batch
                # statistics only blurs that.
                for module in self.model.modules():
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
        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
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
        return nullcontext() if last else self.accelerator.no_sync(self.prepared)

    def state_dict(self) -> dict[str, Any]:
        """All but the weights."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Of the same optimizer and schedule."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])


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
