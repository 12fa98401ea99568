"""AIMET: weight SVD, ranks by its greedy selection, by how near the outputs stay."""

from suite.contenders import aimet_greedy

# isort: split
from aimet_torch.common.defs import CompressionScheme, RankSelectScheme
from aimet_torch.defs import WeightSvdParameters
from torch import nn

NAME, PACKAGES = "AIMET, weight SVD", ("aimet_torch",)
DISTRIBUTIONS = {"aimet_torch": "aimet-torch"}
BUILDS_ON = aimet_greedy


def why_not(model):
    if any(isinstance(m, nn.Embedding) for m in model.modules()):
        return "it runs networks on a tensor of floats of its own, not on tokens"
    if not any(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()):
        return "it takes two-dimensional convolutions and linear layers alone"
    return None


def compress(case, share):
    def parameters(ranks, model):
        mode = WeightSvdParameters.AutoModeParams(RankSelectScheme.greedy, ranks)
        return WeightSvdParameters(WeightSvdParameters.Mode.auto, mode)

    return aimet_greedy.compressed(case, share, CompressionScheme.weight_svd, parameters)
