"""Channels pruned by torch-pruning: groups of the smallest norm, in the whole network."""

import torch
import torch_pruning
from torch import nn

from rankfold.errors import BudgetError

NAME, PACKAGES = "torch-pruning", ("torch_pruning",)
DISTRIBUTIONS = {"torch_pruning": "torch-pruning"}
STEPS = 200


def why_not(model):
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        return "it does not prune recurrent layers"
    return None


def compress(case, share):
    model, batch = case.make_model(), case.data[0]
    last = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Conv1d)][-1]
    pruner = torch_pruning.pruner.BasePruner(
        model,
        batch,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.95,
        global_pruning=True,
        max_pruning_ratio=0.9,
        ignored_layers=[last, *map(model.get_submodule, case.fixed)],
        num_heads={model.get_submodule(name): count for name, count in case.heads.items()},
        iterative_steps=STEPS,
    )
    dense, _ = torch_pruning.utils.count_ops_and_params(model, batch)
    for _ in range(STEPS):
        with torch.enable_grad():
            pruner.step()
        for attention in model.modules():  # of transformers, which keep the sizes beside
            if hasattr(attention, "attention_head_size"):
                heads = attention.num_attention_heads
                attention.attention_head_size = attention.query.out_features // heads
        macs, _ = torch_pruning.utils.count_ops_and_params(model, batch)
        if macs <= share * dense:
            return model
    raise BudgetError(f"it stops at {macs / dense:.0%} of the MACs, asked for {share:.0%}")
