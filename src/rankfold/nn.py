"""Layers for writing networks from scratch: of few factors or small tensors, trained as any other.

from rankfold.nn import SeparableConv2d, TensorTrainLinear

convolution = SeparableConv2d(64, 128, 3, rank=40, padding=1, batch_norm=True)
layer = TensorTrainLinear(1024, 1024, rank=8)
"""

from rankfold.layers import (
    BlockTermLinear,
    CirculantLinear,
    CPLinear,
    FlattenedConv2d,
    HankelLinear,
    KroneckerLinear,
    LowRankConv2d,
    LowRankLinear,
    MonarchLinear,
    SeparableConv2d,
    StructuredLinear,
    StructuredRecurrent,
    TensorRingLinear,
    TensorTrainLinear,
    ToeplitzLikeLinear,
    ToeplitzLinear,
    TuckerLinear,
)

__all__ = [
    "BlockTermLinear",
    "CPLinear",
    "CirculantLinear",
    "FlattenedConv2d",
    "HankelLinear",
    "KroneckerLinear",
    "LowRankConv2d",
    "LowRankLinear",
    "MonarchLinear",
    "SeparableConv2d",
    "StructuredLinear",
    "StructuredRecurrent",
    "TensorRingLinear",
    "TensorTrainLinear",
    "ToeplitzLikeLinear",
    "ToeplitzLinear",
    "TuckerLinear",
]
