"""Ways to run a network: as it is, compiled, as a CUDA graph, or exported to another runtime.

What is fast in one is not always fast in another, so times are taken in the one that will be used.
"""

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.utils import _pytree

from rankfold.batches import Forward, device_of, run_or_explain, running
from rankfold.errors import DeviceError, ModelError, RankfoldError
from rankfold.recurrent_nodes import with_recurrent_nodes

Runtime = Literal["eager", "compile", "cuda-graph", "onnxruntime", "openvino"]
RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)
_PACKAGES = {
    "onnxruntime": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
}
_EXTRAS = {"onnxruntime": "onnx", "openvino": "openvino"}


def check_runtime(runtime: str) -> None:
    """Raise DeviceError unless there is such a runtime and what it needs is here."""
    if runtime not in RUNTIMES:
        raise DeviceError(f"no runtime '{runtime}'; there are {', '.join(RUNTIMES)}")
    if runtime == "cuda-graph" and not torch.cuda.is_available():
        raise DeviceError("the runtime cuda-graph needs a CUDA device, and torch sees none")
    missing = [name for name in _PACKAGES.get(runtime, ()) if find_spec(name) is None]
    if missing:
        raise DeviceError(
            f"the runtime {runtime} needs {', '.join(missing)}: "
            f"pip install 'rankfold[{_EXTRAS[runtime]}]'"
        )


def version_of(runtime: Runtime) -> str:
    """For the record: times of one version are not those of the next."""
    if runtime == "onnxruntime":
        import onnxruntime  # type: ignore[import-untyped]

        return f"onnxruntime {onnxruntime.__version__}, threads rest between runs"
    if runtime == "openvino":
        import openvino

        return f"openvino {openvino.__version__}"
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
            if runtime == "cuda-graph":
                return _captured(model, batch, forward)
            return _exported(model, batch, forward, runtime)
        except RankfoldError:
            raise
        except Exception as error:
            line = (str(error) or type(error).__name__).strip().splitlines()[0]
            raise ModelError(f"the model cannot be run by {runtime}: {line:.200}") from error


def _captured(model: nn.Module, batch: Any, forward: Forward) -> nn.Module:
    if device_of(model).type != "cuda":
        raise DeviceError("the runtime cuda-graph is for models on a CUDA device")
    return GraphNetwork(model, call_of(model, batch, forward))


def _exported(model: nn.Module, batch: Any, forward: Forward, runtime: Runtime) -> nn.Module:
    if device_of(model).type != "cpu":
        raise DeviceError(f"the runtime {runtime} is for models on the CPU")
    call = call_of(model, batch, forward)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        write_onnx(model, call, path)
        if runtime == "openvino":
            return OpenVinoNetwork(path, call.structure)
        return OnnxNetwork(path, call.structure)


@dataclass(frozen=True)
class Call:
    """How a model is called for a batch, and how its outputs are nested."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    structure: Any


def call_of(model: nn.Module, batch: Any, forward: Forward) -> Call:
    """What `forward` calls the model with; raises ModelError if it does so never or again."""
    seen: list[tuple[Any, Any]] = []
    outputs: list[Any] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    after = model.register_forward_hook(lambda m, a, output: outputs.append(output))
    try:
        run_or_explain(forward, model, batch, 0)
    finally:
        hook.remove()
        after.remove()
    if len(seen) != 1:
        raise ModelError(f"forward calls the model {len(seen)} times for a batch, not once")
    return Call(*seen[0], _pytree.tree_flatten(outputs[0])[1])


def write_onnx(model: nn.Module, call: Call, path: Path, dynamic: Any = None) -> None:
    """By torch's exporter through `torch.export`; `dynamic` are its dynamic shapes."""
    with warnings.catch_warnings(), _quiet("torch.onnx"), with_recurrent_nodes(model):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            call.args,
            kwargs=call.kwargs,
            dynamo=True,
            verbose=False,
            dynamic_shapes=dynamic,
        )
        assert program is not None
        program.save(path)


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """The exporter logs what is not installed and not needed."""
    log = logging.getLogger(logger)
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


class GraphNetwork(nn.Module):
    """A model's kernels, recorded once and launched together, for inputs of the same shapes.

    What is small takes as long to launch as to do, kernel by kernel. The outputs are the graph's
    own and stay as they are until it is run again.
    """

    def __init__(self, model: nn.Module, call: Call) -> None:
        super().__init__()
        leaves, self.nesting = _pytree.tree_flatten((call.args, call.kwargs))
        self.given = [one.clone() if isinstance(one, torch.Tensor) else one for one in leaves]
        args, kwargs = _pytree.tree_unflatten(self.given, self.nesting)
        # What is allocated and chosen on first use must not be recorded.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                model(*args, **kwargs)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = model(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raises ModelError for other inputs than those of the recording."""
        leaves, nesting = _pytree.tree_flatten((args, kwargs))
        if nesting != self.nesting:
            raise ModelError("a CUDA graph takes the arguments that it was recorded with")
        for kept, new in zip(self.given, leaves, strict=True):
            if not isinstance(kept, torch.Tensor):
                if kept != new:
                    raise ModelError(f"a CUDA graph recorded with {kept!r} was given {new!r}")
            elif kept.shape != new.shape or kept.dtype != new.dtype:
                raise ModelError(
                    f"a CUDA graph recorded for {kept.dtype} of shape {tuple(kept.shape)} was "
                    f"given {new.dtype} of shape {tuple(new.shape)}"
                )
            else:
                kept.copy_(new)
        self.graph.replay()
        return self.outputs


class FileNetwork(nn.Module):
    """A file run by another runtime, called as the model that it was made from."""

    def __init__(self, structure: Any) -> None:
        super().__init__()
        self.structure = structure

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = [t for t in _pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        arrays = [tensor.detach().contiguous().numpy() for tensor in given]
        found = [torch.from_numpy(array) for array in self.infer(arrays)]
        return _pytree.tree_unflatten(found, self.structure)

    def infer(self, arrays: list[Any]) -> Iterable[Any]:
        """Outputs in the order in which the file has them."""
        raise NotImplementedError


class OnnxNetwork(FileNetwork):
    """An ONNX file run by ONNX Runtime, with as many threads as torch has."""

    def __init__(self, file: Path, structure: Any) -> None:
        import onnxruntime

        super().__init__(structure)
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

    def infer(self, arrays: list[Any]) -> Iterable[Any]:
        return self.session.run(None, dict(zip(self.names, arrays, strict=True)))


class OpenVinoNetwork(FileNetwork):
    """An ONNX or OpenVINO file run by OpenVINO on the CPU, with as many threads as torch has."""

    def __init__(self, file: Path, structure: Any) -> None:
        import openvino

        super().__init__(structure)
        settings = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",  # as in every other runtime
        }
        core = openvino.Core()
        self.compiled = core.compile_model(core.read_model(file), "CPU", settings)

    def infer(self, arrays: list[Any]) -> Iterable[Any]:
        found = self.compiled(arrays)
        return [found[place] for place in range(len(self.compiled.outputs))]


def caller(model: nn.Module, batch: Any, forward: Forward, runtime: Runtime) -> Callable[[], Any]:
    """What runs the model on the batch once, prepared; to be called as it is to be timed."""
    ready = prepare(model, batch, forward, runtime)
    return lambda: run_or_explain(forward, ready, batch, 0)
