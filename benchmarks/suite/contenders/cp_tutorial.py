"""CP by tensorly as tutorials do it: one rank for a layer, alternating least squares.

The rank of each layer is what its share of the MACs buys.
"""

import copy

import tensorly
import torch
from tensorly.decomposition import parafac
from torch import nn

NAME, PACKAGES = "CP, as in tutorials", ("tensorly",)
DISTRIBUTIONS: dict[str, str] = {}


def why_not(model):
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1]
    if not layers:
        return "it has no kxk convolutions"
    widest = max(m.weight.numel() for m in layers)
    return None if widest < 1e6 else "a decomposition takes many minutes a layer"


def decomposed(layer, share):
    out, into, high, wide = layer.weight.shape
    rank = max(1, int(share * layer.weight.numel() / (out + into + high + wide)))
    tensorly.set_backend("pytorch")
    _, (last, first, vertical, horizontal) = parafac(layer.weight.detach(), rank, init="svd")
    (sh, sw), (ph, pw), (dh, dw) = layer.stride, layer.padding, layer.dilation
    chain = nn.Sequential(
        nn.Conv2d(into, rank, 1, bias=False),
        nn.Conv2d(rank, rank, (high, 1), (sh, 1), (ph, 0), (dh, 1), groups=rank, bias=False),
        nn.Conv2d(rank, rank, (1, wide), (1, sw), (0, pw), (1, dw), groups=rank, bias=False),
        nn.Conv2d(rank, out, 1, bias=layer.bias is not None),
    )
    with torch.no_grad():
        chain[0].weight.copy_(first.mT[:, :, None, None])
        chain[1].weight.copy_(vertical.mT[:, None, :, None])
        chain[2].weight.copy_(horizontal.mT[:, None, None, :])
        chain[3].weight.copy_(last[:, :, None, None])
        if layer.bias is not None:
            chain[3].bias.copy_(layer.bias)
    return chain


def compress(case, share):
    model = copy.deepcopy(case.make_model())
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Conv2d) and max(layer.kernel_size) > 1 and layer.in_channels > 3:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, decomposed(layer, share))
    return model
