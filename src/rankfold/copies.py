"""Copies of networks, also of those that keep something of their last forward pass."""

import copy
from typing import TypeVar

import torch
from torch import nn
from torch.utils import _pytree

Network = TypeVar("Network", bound=nn.Module)


def copy_of(model: Network) -> Network:
    """A deep copy of a network.

    What torch does not copy, tensors that were computed with gradients and kept in attributes (the
    last activations, a weight that a hook makes), is there without its history.
    """
    known: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for value in _pytree.tree_leaves(vars(module)):
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                known[id(value)] = value.detach().clone()
    made = copy.deepcopy(model, known)
    # Torch copies scripted modules with their history: trained, they would train the original.
    for parameter in made.parameters():
        if not parameter.is_leaf:
            parameter.detach_().requires_grad_()
    # A class that says itself how it is copied (torch.fx.GraphModule) may leave attributes out.
    for name, value in vars(model).items():
        if name not in vars(made):
            made.__dict__[name] = copy.deepcopy(value, known)
    return made
