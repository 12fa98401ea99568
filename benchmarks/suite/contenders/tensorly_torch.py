"""Tucker layers of tensorly-torch, made from the trained ones."""

import copy

import tltorch
from torch import nn

NAME, PACKAGES = "tensorly-torch, Tucker", ("tltorch",)
DISTRIBUTIONS = {"tltorch": "tensorly-torch"}


def why_not(model):
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1]
    return None if layers else "it has no kxk convolutions"


def compress(case, share):
    model = copy.deepcopy(case.make_model())
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Conv2d) and max(layer.kernel_size) > 1 and layer.in_channels > 3:
            parent, _, child = name.rpartition(".")
            made = tltorch.FactorizedConv.from_conv(
                layer, rank=share, factorization="tucker", implementation="factorized"
            )
            setattr(model.get_submodule(parent), child, made)
    return model
