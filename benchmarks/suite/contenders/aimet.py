"""AIMET: spatial SVD, ranks by its greedy selection, by how near the outputs stay."""

import contextlib
import tempfile
from decimal import Decimal

import torch
from architectures.torchvision_operators import make_importable
from torch import nn

make_importable()  # AIMET imports it
from aimet_torch.common.defs import CompressionScheme, CostMetric, GreedySelectionParameters
from aimet_torch.compress import ModelCompressor
from aimet_torch.defs import SpatialSvdParameters

NAME, PACKAGES = "AIMET, spatial SVD", ("aimet_torch",)
DISTRIBUTIONS = {"aimet_torch": "aimet-torch"}
JUDGED_ON = 8  # batches


def why_not(model):
    kernels = [m.kernel_size for m in model.modules() if isinstance(m, nn.Conv2d)]
    if not any(max(size) > 1 for size in kernels):
        return "it takes spatial convolutions alone"
    return None


def compress(case, share):
    model, batches = case.make_model().eval(), case.data[:JUDGED_ON]
    with torch.no_grad():
        targets = [model(batch) for batch in batches]

    def nearness(network, iterations=None, use_cuda=False):
        with torch.no_grad():
            pairs = zip(batches, targets, strict=True)
            apart = [case.distance(network(batch), target).item() for batch, target in pairs]
        return 1 / (1 + sum(apart) / len(apart))

    ranks = GreedySelectionParameters(Decimal(str(share)), num_comp_ratio_candidates=10)
    mode = SpatialSvdParameters.AutoModeParams(ranks)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # it writes where it is
        small, _ = ModelCompressor.compress_model(
            model,
            nearness,
            None,
            tuple(batches[0].shape),
            CompressionScheme.spatial_svd,
            CostMetric.mac,
            SpatialSvdParameters(SpatialSvdParameters.Mode.auto, mode),
        )
    return small
