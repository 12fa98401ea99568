"""Matrix and tensor decompositions: pure functions on torch tensors, no knowledge of networks."""

from rankfold.decompose.matrix import SVD, svd
from rankfold.decompose.tucker import Tucker, tucker

__all__ = ["SVD", "Tucker", "svd", "tucker"]
