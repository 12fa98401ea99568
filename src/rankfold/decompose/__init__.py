"""Matrix and tensor decompositions: pure functions on torch tensors, no knowledge of networks.

Each returns a small frozen object with its factors, `ranks`, `n_parameters`, `to_tensor()` and
`relative_error(tensor)`. Half precision is computed in float32; `weights` are symmetric positive
semidefinite matrices, one for each mode that has one, that define the norm of the error. Only `svd`
and `full_rank` carry gradients.
"""

from rankfold.decompose.block_term import BlockTerm, block_term
from rankfold.decompose.cluster import ClusterSVD, cluster_svd
from rankfold.decompose.cp import CP, cp, error_preserving_correction
from rankfold.decompose.decomposition import Decomposition
from rankfold.decompose.matrix import SVD, full_rank, svd
from rankfold.decompose.pivoted import Interpolative, PivotedQR, interpolative, pivoted_qr
from rankfold.decompose.randomized import randomized_svd, residual_norm_bound
from rankfold.decompose.rank_one import rank_one_terms
from rankfold.decompose.symmetric import SymmetricRoots, symmetric_roots
from rankfold.decompose.tall_skinny import tall_skinny_svd
from rankfold.decompose.tensor_ring import TensorRing, tensor_ring
from rankfold.decompose.tensor_train import (
    TensorTrain,
    TensorTrainMatrix,
    tensor_train,
    tensor_train_matrix,
)
from rankfold.decompose.triangular import PLU, Cholesky, cholesky, lu, plu
from rankfold.decompose.tucker import Tucker, tucker
from rankfold.decompose.weights import Weights

__all__ = [
    "CP",
    "PLU",
    "SVD",
    "BlockTerm",
    "Cholesky",
    "ClusterSVD",
    "Decomposition",
    "Interpolative",
    "PivotedQR",
    "SymmetricRoots",
    "TensorRing",
    "TensorTrain",
    "TensorTrainMatrix",
    "Tucker",
    "Weights",
    "block_term",
    "cholesky",
    "cluster_svd",
    "cp",
    "error_preserving_correction",
    "full_rank",
    "interpolative",
    "lu",
    "pivoted_qr",
    "plu",
    "randomized_svd",
    "rank_one_terms",
    "residual_norm_bound",
    "svd",
    "symmetric_roots",
    "tall_skinny_svd",
    "tensor_ring",
    "tensor_train",
    "tensor_train_matrix",
    "tucker",
]
