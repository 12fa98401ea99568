"""Published methods, one file each. `METHODS` is the only place that names them all.

Order matters in one way: a rule that reads ranks off one spectrum (EVBMF, energy, fixed fraction)
uses the first method that applies to a layer; a budget lets all of them compete.
"""

from rankfold.methods.block_term import BlockTerm
from rankfold.methods.cp import CanonicalPolyadic, SeparableCanonicalPolyadic
from rankfold.methods.method import Family, Method, Rank, Spectrum, aligned_ranks
from rankfold.methods.moments import WEIGHT_METRIC, Moments
from rankfold.methods.svd import LowRank
from rankfold.methods.tensor_train import TensorTrain
from rankfold.methods.tucker2 import Tucker2
from rankfold.methods.tucker_cp import TuckerCP

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Tucker2,
        LowRank,
        CanonicalPolyadic,
        SeparableCanonicalPolyadic,
        TuckerCP,
        TensorTrain,
        BlockTerm,
    )
}

__all__ = [
    "METHODS",
    "WEIGHT_METRIC",
    "BlockTerm",
    "CanonicalPolyadic",
    "Family",
    "LowRank",
    "Method",
    "Moments",
    "Rank",
    "SeparableCanonicalPolyadic",
    "Spectrum",
    "TensorTrain",
    "Tucker2",
    "TuckerCP",
    "aligned_ranks",
]
