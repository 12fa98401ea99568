"""Linear factors with nothing between them multiplied into one."""

from collections.abc import Mapping

import torch
from torch import nn

from rankfold.errors import PlanError
from rankfold.layers import FewerUnits
from rankfold.methods import Method, Rank, reduction
from rankfold.replacement import put_in_place


def merge_readouts(model: nn.Module, readers: Mapping[str, str]) -> nn.Module:
    """The model in which linear layers have taken in the readouts of the forms that they read.

    `readers` has, by the name of a form with a readout, the name of the linear layer, dense or
    factorized, that alone reads its outputs (`rankfold.analysis.readers`). What is left of the form
    is the smaller recurrent layer of torch's own. Where the reader does not begin with a linear
    layer of that width the readout stays: it depends on shapes alone, never on weights. Changes
    `model`. Raises PlanError for a name that is none of a layer.
    """
    modules = dict(model.named_modules())
    merged: dict[nn.Module, nn.Module] = {}
    for name, reader in readers.items():
        if name not in modules or reader not in modules:
            raise PlanError(f"the model has no layers '{name}' and '{reader}' to merge")
        form, first = modules[name], modules[reader]
        if isinstance(first, nn.Sequential):
            first = first[0]
        if not isinstance(form, FewerUnits) or type(first) is not nn.Linear:
            continue
        if form.readout.out_features == first.in_features:
            merged[form] = _without_readout(form)
            merged[first] = merge_linears(form.readout, first)
    return put_in_place(model, merged)


def planned_form(
    method: Method, layer: nn.Module, rank: Rank, reader: str | None = None
) -> nn.Module:
    """The skeleton of what will be in the layer's place, once a reader has taken in its readout.

    What the reader itself saves by that is not seen here.
    """
    form = reduction.skeleton(method, layer, rank)
    return _without_readout(form) if reader is not None else form


def _without_readout(form: nn.Module) -> nn.Module:
    return form.recurrent if isinstance(form, FewerUnits) else form


def merge_linears(first: nn.Linear, second: nn.Linear) -> nn.Linear:
    """`second(first(x))` as one layer, trainable where one of them is."""
    weight, bias = second.weight.detach().double(), second.bias
    merged = nn.Linear(
        first.in_features,
        second.out_features,
        first.bias is not None or bias is not None,
        device="meta",
        dtype=second.weight.dtype,
    )

    def parameter(value: torch.Tensor, trained: bool) -> nn.Parameter:
        return nn.Parameter(value.to(second.weight.dtype).contiguous(), trained)

    trained = first.weight.requires_grad or second.weight.requires_grad
    merged.weight = parameter(weight @ first.weight.detach().double(), trained)
    if merged.bias is not None:
        total = weight.new_zeros(len(weight))
        if first.bias is not None:
            total = weight @ first.bias.detach().double()
        if bias is not None:
            total = total + bias.detach().double()
        merged.bias = parameter(total, trained if bias is None else bias.requires_grad)
    return merged.train(second.training)
