"""What AIMET's contenders have in common: its greedy selection, by how near the outputs stay."""

from decimal import Decimal

import torch
from architectures.torchvision_operators import make_importable

make_importable()  # AIMET imports it
from aimet_torch.common.defs import CostMetric, GreedySelectionParameters
from aimet_torch.compress import ModelCompressor

JUDGED_ON = 8  # batches


def compressed(case, share, scheme, make_parameters):
    model, batches = case.make_model().eval(), case.data[:JUDGED_ON]
    with torch.no_grad():
        targets = [model(batch) for batch in batches]

    def nearness(network, iterations=None, use_cuda=False):
        with torch.no_grad():
            pairs = zip(batches, targets, strict=True)
            apart = [case.distance(network(batch), target).item() for batch, target in pairs]
        return 1 / (1 + sum(apart) / len(apart))

    ranks = GreedySelectionParameters(Decimal(str(share)), num_comp_ratio_candidates=10)
    small, _ = ModelCompressor.compress_model(
        model,
        nearness,
        None,
        tuple(batches[0].shape),
        scheme,
        CostMetric.mac,
        make_parameters(ranks, model),
    )
    return small
