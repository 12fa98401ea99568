"""rankfold, asked for a share of the MACs, and then int8 by ONNX Runtime's quantizer."""

import rankfold
from suite.contenders import onnx_int8

NAME, PACKAGES, DISTRIBUTIONS = "rankfold, then int8", ("rankfold", "onnxruntime"), {}
BUILDS_ON = onnx_int8

baseline = onnx_int8.baseline
finish = onnx_int8.finish


def why_not(model):
    return None


def compress(case, share):
    model = case.make_model()
    analysis = rankfold.analyze(model, case.data, journal="by-macs")
    return rankfold.factorize(model, analysis.plan(macs=share))
