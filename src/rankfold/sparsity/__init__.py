"""Structured sparsity: groups of weights shrunk to 0 in training, and taken out of the network.

    lasso = sparsity.GroupLasso(model, batch, strength=0.01)
    rankfold.recover(model, data, loss_fn=loss, after_step=lasso)
    small = sparsity.remove_zero_groups(model, batch)

Learning structured sparsity in deep neural networks (Wen et al. 2016), and the same for the
rank-one terms of factorized layers.
"""

from rankfold.narrowing import Kept, Removal
from rankfold.sparsity.groups import Groups, Kind, Slices
from rankfold.sparsity.proximal import GroupLasso
from rankfold.sparsity.removal import find_zero_groups, remove, remove_zero_groups

__all__ = [
    "GroupLasso",
    "Groups",
    "Kept",
    "Kind",
    "Removal",
    "Slices",
    "find_zero_groups",
    "remove",
    "remove_zero_groups",
]
