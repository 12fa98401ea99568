"""int8 by ONNX Runtime's quantizer, timed beside float32 there.

Activations of convolutional networks are calibrated, those of others scaled as they come. The range
is reduced for processors without VNNI, which add pairs of products in 16 bits.
"""

import tempfile
from pathlib import Path

import torch
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn
from torch.utils import _pytree

import rankfold
from rankfold.batches import batch_size, run
from rankfold.runtime import OnnxNetwork, call_of

NAME, PACKAGES, DISTRIBUTIONS = "int8 in ONNX Runtime", ("onnxruntime",), {}
SHARES, TRAINED = (1.0,), False
CALIBRATED_ON = 32  # batches


def why_not(model):
    return None


def baseline(model, case):
    with tempfile.TemporaryDirectory() as folder:  # a session holds what it has read
        return written(model, case, Path(folder))[1]


def written(model, case, folder):
    path = folder / "float32.onnx"
    several = next(batch for batch in case.data if batch_size(batch) > 1)  # one alone is a constant
    rankfold.export(model, path, several, dynamic="all")
    return path, OnnxNetwork(path, call_of(model, several, run).structure)


class Batches(CalibrationDataReader):
    def __init__(self, model, names, batches):
        self.model, self.names, self.left = model, names, iter(batches)

    def get_next(self):
        if (batch := next(self.left, None)) is None:
            return None
        call = call_of(self.model, batch, run)
        leaves = _pytree.tree_leaves((call.args, call.kwargs))
        arrays = [leaf.numpy() for leaf in leaves if isinstance(leaf, torch.Tensor)]
        return dict(zip(self.names, arrays, strict=True))


def compress(case, share):
    return case.make_model().eval()


def finish(model, case):
    with tempfile.TemporaryDirectory() as folder:
        return quantized(model, case, Path(folder))


def quantized(model, case, folder):
    path, network = written(model, case, folder)
    ready, small = path.with_name("ready.onnx"), path.with_name("int8.onnx")
    quant_pre_process(path, ready, skip_symbolic_shape=True)
    weights = {"per_channel": True, "reduce_range": True, "weight_type": QuantType.QInt8}
    if any(isinstance(m, nn.Conv1d | nn.Conv2d) for m in model.modules()):
        batches = Batches(model, network.names, case.data[:CALIBRATED_ON])
        quantize_static(ready, small, batches, activation_type=QuantType.QUInt8, **weights)
    else:  # ranges of transformers' activations differ too much from input to input
        quantize_dynamic(ready, small, **weights)
    return OnnxNetwork(small, network.structure)
