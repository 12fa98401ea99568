"""Queries, keys and values of MiniLM as one layer: decomposed whole, or each by itself.

Writes benchmarks/fused.json and a table of docs/transformers.md: the predicted loss of both at the
same number of parameters, summed over the six layers, in the Fisher metric.
"""

from dataclasses import replace
from pathlib import Path

import minilm
import torch
from race import between_markers, machine, markdown_table, save
from torch import nn

import rankfold
from rankfold.analysis import Analysis
from rankfold.methods import LowRank, Moments, SplitLowRank

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "transformers.md"
SHARES = (0.7, 0.5, 0.3)
NAMES = ("query", "key", "value")


def fused(model: nn.Module, analysis: Analysis, block: int) -> tuple[nn.Linear, Moments]:
    """One layer that makes all three, and its metric: they are given the same."""
    prefix = f"network.encoder.layer.{block}.attention.self"
    layers = [model.get_submodule(f"{prefix}.{name}") for name in NAMES]
    moments = [analysis.moments[f"{prefix}.{name}"] for name in NAMES]
    layer = nn.Linear(384, 3 * 384)
    layer.weight.data = torch.cat([one.weight.detach() for one in layers])
    gradients = torch.block_diag(*(one.gradients for one in moments))
    return layer, replace(moments[0], gradients=gradients)


def main() -> None:
    torch.set_num_threads(1)
    model = minilm.make_model()
    analysis = rankfold.analyze(
        model, minilm.make_data(), layers="network.encoder.*.self.*", metric="fisher", check=False
    )
    losses = {share: [0.0, 0.0] for share in SHARES}
    for block in range(6):
        layer, moments = fused(model, analysis, block)
        whole = LowRank().fit(layer, moments)
        split = SplitLowRank().fit(layer, moments)
        for share in SHARES:
            most = share * layer.weight.numel()
            ranks = [rank for rank in split.ranks() if sum(rank) * 2 * 384 <= most]
            losses[share][0] += whole.loss((int(most // (4 * 384)),))
            losses[share][1] += split.loss(ranks[-1])
    facts = {"losses": losses, "machine": machine()}
    print(facts)
    save(HERE / "fused.json", facts)
    rows = [(f"{share:.0%}", *(f"{loss:.4f}" for loss in both)) for share, both in losses.items()]
    header = ("parameters kept", "whole, one rank", "three parts, their own ranks")
    between_markers(DOCUMENT, "fused", markdown_table(header, rows))


if __name__ == "__main__":
    main()
