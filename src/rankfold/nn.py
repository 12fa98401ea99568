"""Layers for writing networks from scratch: of small tensors, and trained as any other.

from rankfold.nn import TensorTrainLinear

layer = TensorTrainLinear(1024, 1024, rank=8)
"""

from rankfold.layers import (
    BlockTermLinear,
    CirculantLinear,
    CPLinear,
    HankelLinear,
    KroneckerLinear,
    MonarchLinear,
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
    "HankelLinear",
    "KroneckerLinear",
    "MonarchLinear",
    "StructuredLinear",
    "StructuredRecurrent",
    "TensorRingLinear",
    "TensorTrainLinear",
    "ToeplitzLikeLinear",
    "ToeplitzLinear",
    "TuckerLinear",
]
