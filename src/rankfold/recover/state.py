"""The history of a recovery, and the file that it goes on from after an interruption."""

import copy
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from torch import nn

from rankfold import processes
from rankfold.documents import read
from rankfold.errors import CheckpointError
from rankfold.journal import read_entry, write_entry
from rankfold.recover.trainer import Trainer

Keep = Literal["best", "last"]
KEPT: tuple[Keep, ...] = get_args(Keep)


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


class State:
    """The history of a run, and the weights that it will leave: the best met in it, or the last."""

    def __init__(self, model: nn.Module, score: float | None, keep: Keep = "best") -> None:
        self.history: list[Epoch] = []
        self.keep = keep
        self.best = 0
        self.best_score = -math.inf if score is None else score
        self.weights = copy.deepcopy(model.state_dict())

    def add(self, epoch: Epoch, model: nn.Module) -> None:
        self.history.append(epoch)
        if self.keep == "last" or epoch.score is None or epoch.score > self.best_score:
            self.best = epoch.index
            self.best_score = self.best_score if epoch.score is None else epoch.score
            self.weights = copy.deepcopy(model.state_dict())

    @property
    def epochs_since_best(self) -> int:
        return self.history[-1].index - self.best


def write(path: Path, run_name: str, state: State, trainer: Trainer) -> None:
    """Write the training state, so that a kill leaves this file or the one before."""
    training = trainer.state_dict()
    if not processes.is_first():
        return
    document = {
        "run": run_name,
        "history": [asdict(epoch) for epoch in state.history],
        "best": state.best,
        "best_score": state.best_score,
        "best_weights": state.weights,
        "weights": trainer.model.state_dict(),
        **training,
    }
    write_entry(path, document)


def resume(path: Path, run_name: str, state: State, trainer: Trainer) -> None:
    """Bring back the state that `write` wrote; CheckpointError unless it is of this run."""
    try:
        document = read_entry(path)
        if document["run"] != run_name:
            raise CheckpointError(
                f"{path} is of another run (other model, plan or settings): delete it to start anew"
            )
        history = [read(Epoch, epoch, "epoch") for epoch in document["history"]]
        best, best_score = document["best"], float(document["best_score"])
        in_turn = [epoch.index for epoch in history] == list(range(len(history)))
        if not (in_turn and best in range(len(history))):
            raise ValueError(f"epoch {best!r:.40} of {len(history)}")
        # The best weights are loaded last of all: that they fit is seen now.
        for weights in (document["best_weights"], document["weights"]):
            trainer.model.load_state_dict(weights)
        trainer.distribute()
        trainer.load_state_dict(document)
        state.history, state.best, state.best_score = history, best, best_score
        state.weights = document["best_weights"]
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path} is damaged or no training state: {error}") from error
