"""A network written into a file for another program, and the file tried."""

import inspect
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table
from torch import nn
from torch.utils import _pytree

from rankfold.batches import (
    Data,
    Forward,
    batch_size,
    device_of,
    map_tensors,
    run,
    run_or_explain,
    running,
)
from rankfold.copies import copy_of
from rankfold.deployment import fold_batch_norms
from rankfold.errors import CheckpointError, ModelError, RankfoldError
from rankfold.export.formats import FORMATS, FileFormat
from rankfold.measure import Metric, evaluate, latencies, output_error
from rankfold.runtime import Call, call_of
from rankfold.tables import Shown

Format = Literal["onnx", "openvino", "torch", "executorch"]
_CLOSE = 1e-3  # relative norm of the outputs' difference: what other kernels may round otherwise
Axes = Literal["batch", "all"]
_ALL = ()  # of the axes


@dataclass(frozen=True)
class Exported(Shown):
    """A file, and how it did in its runtime beside the network that it was made from."""

    path: Path
    runtime: str  # and its version
    file_bytes: int  # of all files
    dynamic: tuple[str, ...]  # "batch", "size", "last axis": run at another, and gave the same
    output_error: float  # norm of the outputs' difference over that of the network's
    before_ms: float  # of one batch, by torch
    after_ms: float
    metric: tuple[float, float] | None  # by torch, and by the file

    def __rich__(self) -> Table:
        table = Table(title=f"{self.path} in {self.runtime}")
        for column in ("", "torch", "file"):
            table.add_column(column, justify="right" if column else "left")
        table.add_row("latency per batch", f"{self.before_ms:.4g} ms", f"{self.after_ms:.4g} ms")
        if self.metric is not None:
            table.add_row("metric", *(f"{value:.4f}" for value in self.metric))
        table.add_row("output error", "", f"{self.output_error:.2g}")
        table.add_row("size of the file", "", f"{self.file_bytes / 1e6:.2f} MB")
        table.add_row("other sizes that it takes", "", ", ".join(self.dynamic) or "none")
        return table


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    example: Any,
    *,
    to: Format | None = None,
    dynamic: Axes | None = "batch",
    fold: bool = True,
    data: Data | None = None,
    metric: Metric | None = None,
    forward: Forward = run,
) -> Exported:
    """Write a network to a file, run that in its runtime, and compare.

    `to` is "onnx" (ONNX Runtime), "openvino" (by way of ONNX), "torch" (`torch.export`, a .pt2) or
    "executorch" (a .pte); by default what the suffix of the path says. The file needs no rankfold.
    `example` is one batch (see `rankfold.batches`). With `dynamic` the first axis of the inputs may
    have other lengths than there ("batch"), or every axis ("all"), as far as model and runtime
    allow: all axes are tried, then the first and the last, then the first. The others are exported
    at the sizes of the example, and the file is run at other sizes to see. Batch norms are folded
    first (`fold`). With `metric` it is evaluated on `data` by torch and by the file.

    The model is left as it is. Raises CheckpointError for a file that cannot be written, ModelError
    for a model that cannot be exported or a file that gives other outputs, DeviceError for a
    runtime that is not installed.
    """
    target = Path(path)
    kind = FORMATS[to or _format_of(target)]
    kind.check()
    if metric is not None and data is None:
        raise RankfoldError("a metric is evaluated on data: give data")
    network = copy_of(model).cpu().eval()
    batch = map_tensors(example, lambda tensor: tensor.cpu())
    if fold:
        network = fold_batch_norms(network, batch, forward=forward).eval()
    with _room_beside(target) as room:
        # Under its own name, by which it knows the weights beside it.
        beside = room / target.name
        done, file = _tried(network, batch, forward, beside, kind, dynamic)
        if metric is not None and data is not None:
            scores = evaluate(metric, network, data), evaluate(metric, file, data)
            done = replace(done, metric=scores)
        with _writing(target):
            for part in _files_of(beside):
                part.replace(target.with_name(part.name))
    return replace(done, path=target)


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        message = f"{target} cannot be written: {error.strerror or error}"
        raise CheckpointError(message) from error


@contextmanager
def _room_beside(target: Path) -> Iterator[Path]:
    """A folder for the file until it is known to be right."""
    with _writing(target):
        room = tempfile.TemporaryDirectory(dir=target.absolute().parent, prefix=f".{target.name}.")
    with room as name:
        yield Path(name)


def _tried(
    network: nn.Module,
    batch: Any,
    forward: Forward,
    path: Path,
    kind: FileFormat,
    dynamic: Axes | None,
) -> tuple[Exported, nn.Module]:
    """Written, run and compared; and what runs the file."""
    with running(network), torch.no_grad():
        file = _written(network, batch, forward, path, kind, dynamic)
        error = output_error(forward(network, batch), run_or_explain(forward, file, batch, 0))
        if not error <= _CLOSE:
            raise ModelError(f"{path.name} gives other outputs than the model: by {error:.2g}")
        others = _other_sizes(network, file, batch, forward, dynamic)
        calls = [partial(forward, one, batch) for one in (network, file)]
        before, after = latencies(calls, device_of(network))
    size = sum(one.stat().st_size for one in _files_of(path))
    return Exported(path, kind.runtime, size, others, error, before, after, None), file


def _loaded(kind: FileFormat, path: Path, structure: Any) -> nn.Module:
    try:
        return kind.load(path, structure)
    except Exception as error:
        line = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise ModelError(
            f"{path.name} was written but cannot be read by {kind.runtime}: {line:.200}"
        ) from error


def _format_of(path: Path) -> str:
    for name, kind in FORMATS.items():
        if path.suffix == kind.suffix:
            return name
    known = ", ".join(f"{kind.suffix} ({name})" for name, kind in FORMATS.items())
    raise RankfoldError(f"'{path}' does not tell the format: end it in {known}, or give to=")


def _written(
    network: nn.Module,
    batch: Any,
    forward: Forward,
    target: Path,
    kind: FileFormat,
    axes: Axes | None,
) -> nn.Module:
    """With as many dynamic axes as model and runtime allow, of those asked for; what runs it."""
    wanted: dict[Axes | None, tuple[tuple[int, ...] | None, ...]] = {
        "all": (_ALL, (0, -1), (0,), None),
        "batch": ((0,), None),
        None: (None,),
    }
    reason: Exception | None = None
    for some in wanted[axes]:
        try:
            call = call_of(network, _example(batch, some), forward)
            shapes = None if some is None else _dynamic_shapes(network, call, some)
            with _writing(target):
                kind.write(network, call, shapes, target)
            return _loaded(kind, target, call.structure)
        except CheckpointError:
            raise
        except Exception as error:
            reason = error
    if isinstance(reason, ModelError):
        raise reason
    line = (str(reason) or type(reason).__name__).strip().splitlines()[0]
    raise ModelError(f"the model cannot be exported: {line:.300}") from reason


def _example(batch: Any, axes: tuple[int, ...] | None) -> Any:
    """Of two samples at least: an axis of length 1 would be taken for one that broadcasts."""
    size = batch_size(batch)
    if axes is None or size != 1:
        return batch
    return map_tensors(batch, partial(_more_samples, size=size))


def _dynamic_shapes(network: nn.Module, call: Call, axes: tuple[int, ...]) -> dict[str, Any]:
    """By parameter of the forward, which axes of a tensor may have other lengths, or all of them.

    The exporter finds out which of them really can.
    """

    def of(tensor: Any) -> Any:
        if not isinstance(tensor, torch.Tensor) or tensor.dim() == 0:
            return None
        free = range(tensor.dim()) if axes == _ALL else {axis % tensor.dim() for axis in axes}
        longer = [axis for axis in free if tensor.shape[axis] > 1]  # one might be broadcast
        return dict.fromkeys(longer, torch.export.Dim.AUTO)

    args, kwargs = _pytree.tree_map(of, call.args), _pytree.tree_map(of, call.kwargs)
    return dict(inspect.signature(network.forward).bind(*args, **kwargs).arguments)


def _other_sizes(
    network: nn.Module, file: nn.Module, batch: Any, forward: Forward, dynamic: Axes | None
) -> tuple[str, ...]:
    """What of the inputs may be longer or shorter: tried."""
    tries: list[tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = []
    size = batch_size(batch)
    if dynamic is not None:
        tries.append(("batch", partial(_more_samples, size=size)))
    if dynamic == "all":
        tries.extend([("size", _larger), ("last axis", _longer)])
    found = [name for name, change in tries if _agree(network, file, batch, forward, change)]
    return tuple(name for name in found if name != "last axis" or "size" not in found)


def _more_samples(tensor: torch.Tensor, size: int) -> torch.Tensor:
    if tensor.dim() == 0 or tensor.shape[0] != size:
        return tensor
    return torch.cat([tensor, tensor[:1]])


def _larger(tensor: torch.Tensor) -> torch.Tensor:
    """Twice as long along the last axes of pictures, sounds and sequences."""
    first = {2: 1, 3: 2, 4: 2, 5: 2}.get(tensor.dim(), tensor.dim())
    for axis in range(first, tensor.dim()):
        tensor = torch.cat([tensor, tensor], axis)
    return tensor


def _longer(tensor: torch.Tensor) -> torch.Tensor:
    """Twice as long along the last axis: the width of pictures, the length of sounds."""
    return tensor if tensor.dim() < 2 else torch.cat([tensor, tensor], -1)


def _agree(
    network: nn.Module,
    file: nn.Module,
    batch: Any,
    forward: Forward,
    change: Callable[[torch.Tensor], torch.Tensor],
) -> bool:
    """Whether the file takes what the network takes, and gives the same."""
    changed = map_tensors(batch, change)
    try:
        return output_error(forward(network, changed), forward(file, changed)) <= _CLOSE
    except Exception:
        return False


def _files_of(target: Path) -> Sequence[Path]:
    """The file, and those with its weights beside it."""
    names = (target, target.with_suffix(".bin"), target.with_name(target.name + ".data"))
    return [path for path in names if path.is_file()]
