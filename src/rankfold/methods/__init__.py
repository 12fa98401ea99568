"""Published methods, one file each. `METHODS` is the only place that names them all.

Order matters in one way: a rule that reads ranks off one spectrum (EVBMF, energy, fixed fraction)
uses the first method that applies to a layer; a budget lets all of them compete.
"""

from collections import Counter
from collections.abc import Sequence

from rankfold.errors import RankfoldError
from rankfold.methods.bicluster import Bicluster
from rankfold.methods.block_diagonal import BlockDiagonal
from rankfold.methods.block_term import BlockTerm
from rankfold.methods.circulant import Circulant, Hankel, Toeplitz
from rankfold.methods.cp import CanonicalPolyadic, SeparableCanonicalPolyadic
from rankfold.methods.fewer_units import RemoveUnits
from rankfold.methods.fixed_basis import FixedBasis
from rankfold.methods.flattened import Flattened
from rankfold.methods.full_rank import FullRank
from rankfold.methods.interpolative import Interpolative
from rankfold.methods.kronecker import Kronecker
from rankfold.methods.low_rank_inputs import LowRankInputs
from rankfold.methods.method import Family, Method, Rank, Spectrum, aligned_ranks, other_kind
from rankfold.methods.moments import WEIGHT_METRIC, Moments
from rankfold.methods.monarch import Monarch
from rankfold.methods.monochromatic import Monochromatic
from rankfold.methods.projected_units import ProjectUnits
from rankfold.methods.separable import Separable
from rankfold.methods.separable3 import Separable3
from rankfold.methods.separable_basis import SeparableBasis
from rankfold.methods.split_svd import SplitLowRank
from rankfold.methods.svd import LowRank
from rankfold.methods.tensor_ring import TensorRing
from rankfold.methods.tensor_train import TensorTrain
from rankfold.methods.tensor_train_embedding import EmbeddingTrain
from rankfold.methods.tensorized_train import TensorizedTrain
from rankfold.methods.tensorized_tucker import TensorizedTucker
from rankfold.methods.toeplitz_like import ToeplitzLike
from rankfold.methods.tucker2 import Tucker2
from rankfold.methods.tucker_cp import TuckerCP

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Tucker2,
        LowRank,
        SplitLowRank,
        Separable,
        Separable3,
        SeparableBasis,
        Flattened,
        Monochromatic,
        FixedBasis,
        CanonicalPolyadic,
        SeparableCanonicalPolyadic,
        TuckerCP,
        TensorTrain,
        TensorizedTrain,
        TensorizedTucker,
        Kronecker,
        BlockTerm,
        Bicluster,
        TensorRing,
        BlockDiagonal,
        Monarch,
        ToeplitzLike,
        Circulant,
        Toeplitz,
        Hankel,
        Interpolative,
        EmbeddingTrain,
        FullRank,
        RemoveUnits,
        ProjectUnits,
        LowRankInputs,
    )
}

# Those that an analysis tries unless it is told others: quick to fit, and often the best.
# Interpolative is not among them: where samples are few, its predictions are far too good.
DEFAULT_METHODS = ("tucker2", "svd", "split-svd", "separable", "full-rank", "fewer-units")

Methods = str | Sequence[str | Method]


def make_methods(methods: Methods | None = None) -> list[Method]:
    """The methods of these names, with their default settings, or these themselves.

    "all" are those of `METHODS`, None those of `DEFAULT_METHODS`. Raises RankfoldError for a name
    that there is not, and for two methods of one name.
    """
    if methods is None:
        methods = DEFAULT_METHODS
    given = [methods] if isinstance(methods, str) else list(methods)
    if given == ["all"]:
        given = list(METHODS)
    for one in given:
        if isinstance(one, str) and one not in METHODS:
            raise RankfoldError(f"no method '{one:.40}'; there are all, {', '.join(METHODS)}")
    made = [METHODS[one]() if isinstance(one, str) else one for one in given]
    twice = [name for name, count in Counter(one.name for one in made).items() if count > 1]
    if twice:
        raise RankfoldError(f"the method '{twice[0]}' is given twice")
    return made


__all__ = [
    "DEFAULT_METHODS",
    "METHODS",
    "WEIGHT_METRIC",
    "Bicluster",
    "BlockDiagonal",
    "BlockTerm",
    "CanonicalPolyadic",
    "Circulant",
    "EmbeddingTrain",
    "Family",
    "FixedBasis",
    "Flattened",
    "FullRank",
    "Hankel",
    "Interpolative",
    "Kronecker",
    "LowRank",
    "LowRankInputs",
    "Method",
    "Methods",
    "Moments",
    "Monarch",
    "Monochromatic",
    "ProjectUnits",
    "Rank",
    "RemoveUnits",
    "Separable",
    "Separable3",
    "SeparableBasis",
    "SeparableCanonicalPolyadic",
    "Spectrum",
    "SplitLowRank",
    "TensorRing",
    "TensorTrain",
    "TensorizedTrain",
    "TensorizedTucker",
    "Toeplitz",
    "ToeplitzLike",
    "Tucker2",
    "TuckerCP",
    "aligned_ranks",
    "make_methods",
    "other_kind",
]
