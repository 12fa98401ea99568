"""Ways to run a network: as it is, compiled, or exported to another runtime.

What is fast in one is not always fast in another, so times are taken in the one that will be used.
"""

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.utils import _pytree

from rankfold.batches import Forward, device_of, run_or_explain, running
from rankfold.errors import DeviceError, ModelError

Runtime = Literal["eager", "compile", "onnxruntime"]
RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)


def check_runtime(runtime: str) -> None:
    """Raise DeviceError unless there is such a runtime and what it needs is installed."""
    if runtime not in RUNTIMES:
        raise DeviceError(f"no runtime '{runtime}'; there are {', '.join(RUNTIMES)}")
    missing = [
        name
        for name in ("onnx", "onnxscript", "onnxruntime")
        if runtime == "onnxruntime" and find_spec(name) is None
    ]
    if missing:
        raise DeviceError(f"the runtime needs {', '.join(missing)}: pip install 'rankfold[onnx]'")


def version_of(runtime: Runtime) -> str:
    """For the record: times of one version are not those of the next."""
    if runtime == "onnxruntime":
        import onnxruntime  # type: ignore[import-untyped]

        return f"onnxruntime {onnxruntime.__version__}, threads rest between runs"
    return f"torch {torch.__version__}, {runtime}"


def prepare(model: nn.Module, batch: Any, forward: Forward, runtime: Runtime) -> nn.Module:
    """A module that is called as `model` is and gives the same outputs, by way of the runtime.

    In eval mode, for inputs of the shapes of `batch`. `model` itself for eager mode. Raises
    ModelError for a model that the runtime cannot take, DeviceError for a runtime that is not here.
    """
    check_runtime(runtime)
    if runtime == "eager":
        return model
    with running(model), torch.no_grad():
        try:
            if runtime == "compile":
                # Compilations of other modules with the same forward would count as recompilations
                # of this one, of which there may be few; past that, torch quietly does not compile.
                torch.compiler.reset()
                compiled: Any = torch.compile(model, dynamic=False)
                run_or_explain(forward, compiled, batch, 0)  # compiles
                return compiled
            return _exported(model, batch, forward)
        except ModelError:
            raise
        except Exception as error:
            line = (str(error) or type(error).__name__).strip().splitlines()[0]
            raise ModelError(f"the model cannot be run by {runtime}: {line:.200}") from error


def _exported(model: nn.Module, batch: Any, forward: Forward) -> nn.Module:
    if device_of(model).type != "cpu":
        raise DeviceError("the runtime onnxruntime is for models on the CPU")
    args, kwargs, output = _call_of(model, batch, forward)
    _, structure = _pytree.tree_flatten(output)
    with warnings.catch_warnings(), _quiet("torch.onnx"), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, args, kwargs=kwargs, dynamo=True, verbose=False)
        assert program is not None
        path = Path(folder, "model.onnx")
        program.save(path)
        return _OnnxNetwork(path, structure)


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """The exporter logs what is not installed and not needed."""
    log = logging.getLogger(logger)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _call_of(model: nn.Module, batch: Any, forward: Forward) -> tuple[tuple[Any, ...], Any, Any]:
    """The arguments that `forward` calls the model with, and what comes back."""
    seen: list[tuple[Any, Any]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    outputs: list[Any] = []
    after = model.register_forward_hook(lambda m, a, output: outputs.append(output))
    try:
        run_or_explain(forward, model, batch, 0)
    finally:
        hook.remove()
        after.remove()
    if len(seen) != 1:
        raise ModelError(f"forward calls the model {len(seen)} times for a batch, not once")
    return *seen[0], outputs[0]


class _OnnxNetwork(nn.Module):
    """An ONNX file run by ONNX Runtime, with as many threads as torch has."""

    def __init__(self, file: Path, structure: Any) -> None:
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        # Threads that wait busily for more work would be in the way of the network that is timed
        # in turn with this one.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.session = onnxruntime.InferenceSession(
            file, options, providers=["CPUExecutionProvider"]
        )
        self.names = [given.name for given in self.session.get_inputs()]
        self.structure = structure

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = [t for t in _pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        feed = {
            name: tensor.detach().contiguous().numpy()
            for name, tensor in zip(self.names, given, strict=True)
        }
        found = [torch.from_numpy(array) for array in self.session.run(None, feed)]
        return _pytree.tree_unflatten(found, self.structure)


def caller(model: nn.Module, batch: Any, forward: Forward, runtime: Runtime) -> Callable[[], Any]:
    """What runs the model on the batch once, prepared; to be called as it is to be timed."""
    ready = prepare(model, batch, forward, runtime)
    return lambda: run_or_explain(forward, ready, batch, 0)
