"""Tucker-2 by tensorly as tutorials do it: every kxk convolution by itself, ranks by EVBMF.

EVBMF gives one pair of ranks for a layer; for other sizes both are scaled, alike in all layers,
until the MACs are what is asked for.
"""

import copy

import tensorly
import torch
from tensorly.decomposition import partial_tucker
from torch import nn

from rankfold.batches import run
from rankfold.cost import count_macs
from rankfold.ranks import evbmf_rank

NAME, PACKAGES = "Tucker-2 with EVBMF ranks, as in tutorials", ("tensorly",)
DISTRIBUTIONS: dict[str, str] = {}


def why_not(model):
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1]
    return None if layers else "it has no kxk convolutions"


def ranks_of(layer):
    weight = layer.weight.detach()
    rows = [weight.movedim(mode, 0).flatten(1) for mode in (0, 1)]
    found = [evbmf_rank(torch.linalg.svdvals(row), tuple(row.shape)) for row in rows]
    return [max(1, rank) for rank in found]


def chain_of(layer, ranks):
    geometry = {name: getattr(layer, name) for name in ("stride", "padding", "dilation")}
    return nn.Sequential(
        nn.Conv2d(layer.in_channels, ranks[1], 1, bias=False),
        nn.Conv2d(ranks[1], ranks[0], layer.kernel_size, **geometry, bias=False),
        nn.Conv2d(ranks[0], layer.out_channels, 1, bias=layer.bias is not None),
    )


def fill(chain, layer, ranks):
    tensorly.set_backend("pytorch")
    (core, (last, first)), _ = partial_tucker(layer.weight.detach(), ranks, modes=[0, 1])
    with torch.no_grad():
        chain[0].weight.copy_(first.mT[:, :, None, None])
        chain[1].weight.copy_(core)
        chain[2].weight.copy_(last[:, :, None, None])
        if layer.bias is not None:
            chain[2].bias.copy_(layer.bias)


def replaced(model, found, scale, filled=False):
    model = copy.deepcopy(model)
    for name, whole in found.items():
        layer = model.get_submodule(name)
        sizes = layer.weight.shape[:2]
        ranks = [max(1, min(round(scale * r), n)) for r, n in zip(whole, sizes, strict=True)]
        chain = chain_of(layer, ranks)
        if filled:
            fill(chain, layer, ranks)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, chain)
    return model


def compress(case, share):
    model = case.make_model()
    kernels = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    found = {
        name: ranks_of(layer)
        for name, layer in kernels
        if max(layer.kernel_size) > 1 and layer.in_channels > 3
    }
    dense = count_macs(lambda: run(model, case.data[0]))
    low, high = 0.0, 4.0
    for _ in range(10):
        middle = (low + high) / 2
        small = replaced(model, found, middle)
        kept = count_macs(lambda small=small: run(small, case.data[0])) / dense
        low, high = (middle, high) if kept <= share else (low, middle)
    return replaced(model, found, low, filled=True)
