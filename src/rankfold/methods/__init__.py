"""Published methods, one file each. `METHODS` is the only place that names them all.

Order matters in one way: a rule that reads ranks off one spectrum (EVBMF, energy, fixed fraction)
uses the first method that applies to a layer; a budget lets all of them compete.
"""

from rankfold.methods.block_term import BlockTerm
from rankfold.methods.cp import CanonicalPolyadic, SeparableCanonicalPolyadic
from rankfold.methods.fewer_units import RemoveUnits
from rankfold.methods.fixed_basis import FixedBasis
from rankfold.methods.flattened import Flattened
from rankfold.methods.full_rank import FullRank
from rankfold.methods.interpolative import Interpolative
from rankfold.methods.method import Family, Method, Rank, Spectrum, aligned_ranks, other_kind
from rankfold.methods.moments import WEIGHT_METRIC, Moments
from rankfold.methods.separable import Separable
from rankfold.methods.separable3 import Separable3
from rankfold.methods.separable_basis import SeparableBasis
from rankfold.methods.svd import LowRank
from rankfold.methods.tensor_train import TensorTrain
from rankfold.methods.tucker2 import Tucker2
from rankfold.methods.tucker_cp import TuckerCP

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Tucker2,
        LowRank,
        Separable,
        Separable3,
        SeparableBasis,
        Flattened,
        FixedBasis,
        CanonicalPolyadic,
        SeparableCanonicalPolyadic,
        TuckerCP,
        TensorTrain,
        BlockTerm,
        Interpolative,
        FullRank,
        RemoveUnits,
    )
}

__all__ = [
    "METHODS",
    "WEIGHT_METRIC",
    "BlockTerm",
    "CanonicalPolyadic",
    "Family",
    "FixedBasis",
    "Flattened",
    "FullRank",
    "Interpolative",
    "LowRank",
    "Method",
    "Moments",
    "Rank",
    "RemoveUnits",
    "Separable",
    "Separable3",
    "SeparableBasis",
    "SeparableCanonicalPolyadic",
    "Spectrum",
    "TensorTrain",
    "Tucker2",
    "TuckerCP",
    "aligned_ranks",
    "other_kind",
]
