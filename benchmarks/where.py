"""Where the time of a network goes, by kind of operator."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

import rankfold
from rankfold.batches import run
from rankfold.measure import in_fastest_memory_format

WARM_UP, PROFILED = 5, 20  # runs
KINDS = {
    "convolutions": ("aten::mkldnn_convolution",),
    "small convolutions": ("aten::_slow_conv2d_forward", "aten::thnn_conv2d"),
    "LSTMs": ("aten::mkldnn_rnn_layer", "aten::lstm"),
    "linear layers": ("aten::addmm", "aten::mm"),
    "pooling": ("aten::max_pool2d_with_indices", "aten::_adaptive_avg_pool2d"),
    "batch norm and ReLU": ("aten::native_batch_norm", "aten::clamp_min", "aten::clamp_min_"),
}
OTHER = "all else"
# In ONNX Runtime, by the operator.
ONNX_KINDS = {
    "convolutions": ("Conv", "FusedConv"),
    "LSTMs": ("LSTM",),
    "linear layers": ("Gemm", "MatMul", "FusedMatMul", "FusedGemm"),
    "pooling": ("MaxPool", "AveragePool", "GlobalAveragePool", "ReduceMean"),
    "other layouts of numbers": ("ReorderInput", "ReorderOutput", "Transpose", "Reshape"),
}
BETWEEN = "between operators"


def in_eager_mode(network: nn.Module, batch: torch.Tensor) -> dict[str, float]:
    """Milliseconds in eager mode by kind of operator, each without the operators that it calls."""
    ready = in_fastest_memory_format(network, batch)
    for _ in range(WARM_UP):
        run(ready, batch)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        for _ in range(PROFILED):
            run(ready, batch)
    found = dict.fromkeys((*KINDS, OTHER), 0.0)
    for event in seen.key_averages():
        kind = next((k for k, names in KINDS.items() if event.key in names), OTHER)
        found[kind] += event.self_cpu_time_total / 1e3 / PROFILED
    return found


def in_onnx_runtime(network: nn.Module, batch: torch.Tensor) -> dict[str, float]:
    """Milliseconds in ONNX Runtime by kind of operator, and what is left of the whole run."""
    import onnxruntime

    with TemporaryDirectory() as folder:
        file = Path(folder, "network.onnx")
        rankfold.export(network, file, batch, dynamic=None)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder, "profile"))
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        given = {session.get_inputs()[0].name: batch.numpy()}
        for _ in range(WARM_UP + PROFILED):
            session.run(None, given)
        events = json.loads(Path(session.end_profiling()).read_text())
    runs = [event for event in events if event["name"] == "model_run"][WARM_UP:]
    nodes = [event for event in events if event["cat"] == "Node" and "op_name" in event["args"]]
    found = dict.fromkeys((*ONNX_KINDS, OTHER), 0.0)
    for event in nodes:
        if event["ts"] >= runs[0]["ts"] and event["name"].endswith("_kernel_time"):
            operator = event["args"]["op_name"]
            kind = next((k for k, names in ONNX_KINDS.items() if operator in names), OTHER)
            found[kind] += event["dur"] / 1e3 / PROFILED
    whole = sum(event["dur"] for event in runs) / 1e3 / PROFILED
    return found | {BETWEEN: whole - sum(found.values())}
