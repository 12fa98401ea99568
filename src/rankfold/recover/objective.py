"""What training lowers: the distance from a teacher, a loss on labels, and penalties."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from rankfold.batches import (
    Data,
    Forward,
    all_finite,
    device_of,
    map_tensors,
    run_or_explain,
    running,
    split_batch,
    tensors_of,
    to_device,
)
from rankfold.distances import Distance, SquaredError
from rankfold.errors import CalibrationError, ModelError, RankfoldError
from rankfold.progress import Progress

LossFunction = Callable[[Any, Any], torch.Tensor]  # (output, label) -> scalar
Penalty = Callable[[nn.Module], torch.Tensor]  # of the weights alone -> scalar

CACHE_BYTES = 1 << 30  # of the teacher's outputs, kept over epochs when the data is a sequence


class Objective:
    """The loss of one batch; the teacher's outputs are computed once where they can be."""

    def __init__(
        self,
        teacher: nn.Module | None,
        distance: Distance,
        loss_fn: LossFunction | None,
        forward: Forward,
        features: Sequence[str] = (),
        autocast: torch.dtype | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """`features` names modules whose outputs are matched too; `autocast`: of the student.

        Of a teacher that takes all processes to run nothing is to be cached, since they do not come
        with the same batch again.
        """
        if features and teacher is None:
            raise RankfoldError("features are those of a teacher: give one")
        self.teacher, self.distance = teacher, distance
        self.loss_fn, self.forward = loss_fn, forward
        self.features, self.autocast = tuple(features), autocast
        self.cache: dict[int, tuple[Any, Any]] = {}  # id of a batch: the batch, the targets
        self.cached_bytes, self.cache_bytes = 0, cache_bytes

    def __call__(self, model: nn.Module, batch: Any, index: int, kept: bool) -> torch.Tensor:
        """The loss; `kept` says that the caller holds this batch and will come with it again."""
        device = device_of(model)
        moved = to_device(batch, device)
        with torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
            output, features = self._run(model, moved, index)
        if self.autocast is not None:
            output, features = map_tensors((output, features), _in_float32)
        loss = torch.zeros((), device=device)
        if self.loss_fn is not None:
            loss = loss + self._on_labels(output, split_batch(moved)[1], index)
        if self.teacher is not None:
            target, known = self._target(batch, moved, index, kept)
            loss = loss + self.distance(output, target)
            for name in self.features:
                loss = loss + _feature_distance(name, features[name], known[name])
        if not torch.isfinite(loss) and not all_finite(moved):
            raise CalibrationError(f"batch {index} of the data holds NaN or infinity")
        return loss

    def mean(self, model: nn.Module, data: Data, progress: Progress) -> float:
        """The mean loss over the data, in eval mode."""
        kept = isinstance(data, list | tuple)
        with running(model), torch.no_grad():
            batches = enumerate(progress(data, "validating"))
            losses = [self(model, batch, index, kept).item() for index, batch in batches]
        if not losses:
            raise CalibrationError("the validation data yields no batch")
        return sum(losses) / len(losses)

    def _run(self, model: nn.Module, batch: Any, index: int) -> tuple[Any, Mapping[str, Any]]:
        """The output, and what the modules that are features gave."""
        if not self.features:
            return run_or_explain(self.forward, model, batch, index), {}
        with _outputs_of(model, self.features) as found:
            output = run_or_explain(self.forward, model, batch, index)
        if missing := [name for name in self.features if name not in found]:
            raise ModelError(f"the forward pass never calls '{missing[0]}', which is a feature")
        return output, found

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

    def _target(
        self, batch: Any, moved: Any, index: int, kept: bool
    ) -> tuple[Any, Mapping[str, Any]]:
        if kept and id(batch) in self.cache:
            return self.cache[id(batch)][1]
        assert self.teacher is not None
        with running(self.teacher), torch.no_grad():
            target = self._run(self.teacher, moved, index)
        size = sum(tensor.nbytes for tensor in tensors_of(target))
        if kept and self.cached_bytes + size <= self.cache_bytes:
            self.cached_bytes += size
            self.cache[id(batch)] = (batch, target)
        return target


@contextmanager
def _outputs_of(model: nn.Module, names: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    """Within: what the named modules gave when they were last called."""
    inner = getattr(model, "module", model)  # within a wrapper for several processes
    modules = dict(inner.named_modules())
    found: dict[str, Any] = {}

    def keep(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        found[name] = output

    hooks = []
    for name in names:
        if name not in modules:
            raise RankfoldError(f"the model has no module '{name}' to take features of")
        hooks.append(modules[name].register_forward_hook(partial(keep, name)))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _feature_distance(name: str, output: Any, target: Any) -> torch.Tensor:
    try:
        return SquaredError()(output, target)
    except ModelError as error:
        raise ModelError(f"feature '{name}': {error}") from error


def _in_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
