"""AIMET: spatial SVD, ranks by its greedy selection, by how near the outputs stay."""

from suite.contenders import aimet_greedy

# isort: split
from aimet_torch.common.defs import CompressionScheme
from aimet_torch.defs import SpatialSvdParameters
from torch import nn

NAME, PACKAGES = "AIMET, spatial SVD", ("aimet_torch",)
DISTRIBUTIONS = {"aimet_torch": "aimet-torch"}
BUILDS_ON = aimet_greedy


def why_not(model):
    kernels = [m.kernel_size for m in model.modules() if isinstance(m, nn.Conv2d)]
    if not any(max(size) > 1 for size in kernels):
        return "it takes spatial convolutions alone"
    return None


def dilated(model):
    """It dies of these."""
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    return [m for m in convolutions if max(m.dilation) > 1]


def compress(case, share):
    def parameters(ranks, model):
        mode = SpatialSvdParameters.AutoModeParams(ranks, modules_to_ignore=dilated(model))
        return SpatialSvdParameters(SpatialSvdParameters.Mode.auto, mode)

    return aimet_greedy.compressed(case, share, CompressionScheme.spatial_svd, parameters)
