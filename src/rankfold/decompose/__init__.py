"""Matrix and tensor decompositions: pure functions on torch tensors, no knowledge of networks."""

from rankfold.decompose.matrix import SVD, full_rank, svd
from rankfold.decompose.pivoted import Interpolative, PivotedQR, interpolative, pivoted_qr
from rankfold.decompose.randomized import randomized_svd, residual_norm_bound
from rankfold.decompose.tensor_train import (
    TensorTrain,
    TensorTrainMatrix,
    tensor_train,
    tensor_train_matrix,
)
from rankfold.decompose.tucker import Tucker, tucker

__all__ = [
    "SVD",
    "Interpolative",
    "PivotedQR",
    "TensorTrain",
    "TensorTrainMatrix",
    "Tucker",
    "full_rank",
    "interpolative",
    "pivoted_qr",
    "randomized_svd",
    "residual_norm_bound",
    "svd",
    "tensor_train",
    "tensor_train_matrix",
    "tucker",
]
