"""The formats of files, each with what writes it and what runs it."""

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankfold.copies import copy_of
from rankfold.errors import DeviceError
from rankfold.runtime import Call, FileNetwork, OnnxNetwork, OpenVinoNetwork, write_onnx

DynamicShapes = dict[str, Any] | None


@dataclass(frozen=True)
class FileFormat:
    """How a network is written, and what runs the file; all by the name of the format."""

    suffix: str
    packages: tuple[str, ...]  # that have to be installed, the runtime's last
    extra: str
    write: Callable[[nn.Module, Call, DynamicShapes, Path], None]
    load: Callable[[Path, Any], nn.Module]  # the file, and how outputs are nested

    @property
    def runtime(self) -> str:
        """The runtime and its version."""
        name = self.packages[-1]
        return f"torch {torch.__version__}" if name == "torch" else f"{name} {version(name)}"

    def check(self) -> None:
        """Raise DeviceError unless the packages are installed."""
        missing = [name for name in self.packages if find_spec(name) is None]
        if missing:
            raise DeviceError(
                f"{self.suffix} files need {', '.join(missing)}: "
                f"pip install 'rankfold[{self.extra}]'"
            )


def _write_onnx(network: nn.Module, call: Call, shapes: DynamicShapes, path: Path) -> None:
    write_onnx(network, call, path, shapes)


def _write_openvino(network: nn.Module, call: Call, shapes: DynamicShapes, path: Path) -> None:
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        onnx = Path(folder, "model.onnx")
        write_onnx(network, call, onnx, shapes)
        openvino.save_model(openvino.convert_model(onnx), path, compress_to_fp16=False)


def _program(network: nn.Module, call: Call, shapes: DynamicShapes) -> Any:
    return torch.export.export(network, call.args, call.kwargs, dynamic_shapes=shapes)


def _write_program(network: nn.Module, call: Call, shapes: DynamicShapes, path: Path) -> None:
    torch.export.save(_program(network, call, shapes), path)


def _write_executorch(network: nn.Module, call: Call, shapes: DynamicShapes, path: Path) -> None:
    """By XNNPACK what it has, the rest by portable kernels.

    XNNPACK lays weights out by itself, and takes none that are channels-last already.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = _program(_contiguous(network), call, shapes)
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    path.write_bytes(lowered.to_executorch().buffer)


def _contiguous(network: nn.Module) -> nn.Module:
    # torch declares this overload of `to` without its memory format.
    return copy_of(network).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


class ProgramNetwork(nn.Module):
    """A file of `torch.export`."""

    def __init__(self, file: Path, structure: Any) -> None:
        super().__init__()
        # Out of sight of torch: a program has no training mode to be put in.
        self._program = [torch.export.load(file).module()]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._program[0](*args, **kwargs)


class ExecutorchNetwork(FileNetwork):
    """A file of ExecuTorch, run by its runtime."""

    def __init__(self, file: Path, structure: Any) -> None:
        from executorch.runtime import Runtime

        super().__init__(structure)
        program = Runtime.get().load_program(file.read_bytes())
        self._loaded = program, program.load_method("forward")  # a method needs its program

    def infer(self, arrays: list[Any]) -> Iterable[Any]:
        """Copies: the runtime writes the next outputs where these are."""
        found = self._loaded[1].execute([torch.from_numpy(array) for array in arrays])
        return [tensor.clone().numpy() for tensor in found]


FORMATS = {
    "onnx": FileFormat(
        ".onnx", ("onnx", "onnxscript", "onnxruntime"), "onnx", _write_onnx, OnnxNetwork
    ),
    "openvino": FileFormat(
        ".xml", ("onnx", "onnxscript", "openvino"), "openvino", _write_openvino, OpenVinoNetwork
    ),
    "torch": FileFormat(".pt2", ("torch",), "torch", _write_program, ProgramNetwork),
    "executorch": FileFormat(
        ".pte", ("executorch",), "executorch", _write_executorch, ExecutorchNetwork
    ),
}
