"""Training for low rank: ranks that are learned, or cut in steps, regularisers, and from scratch.

Layers to write networks of low rank with are in `rankfold.nn`.
"""

from rankfold.training.dense import dense_again
from rankfold.training.gradual import gradually
from rankfold.training.lc import LearnedRanks, Round, learn_ranks
from rankfold.training.regularizers import FrobeniusDecay, NuclearNorm, Orthogonality
from rankfold.training.spectral import spectral_initialisation

__all__ = [
    "FrobeniusDecay",
    "LearnedRanks",
    "NuclearNorm",
    "Orthogonality",
    "Round",
    "dense_again",
    "gradually",
    "learn_ranks",
    "spectral_initialisation",
]
