"""Linear maps with nothing between them multiplied into one."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import nn

from rankfold.errors import PlanError
from rankfold.layers import CONVOLUTIONS, TRANSPOSED, Dense, ReducedStates, Transposed
from rankfold.methods import Method, Rank, reduction
from rankfold.replacement import put_in_place

Layer = Dense | Transposed
LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)
Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
NORMS: tuple[type[nn.Module], ...] = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
)

Pair = tuple[str, str]


def merge_pairs(model: nn.Module, pairs: Iterable[Pair]) -> nn.Module:
    """The model in which each pair of named modules is one, the pairs in turn.

    What `merged` makes of them is in the place of the layer, or of the first of two; in the other
    place is an `nn.Identity`. A factorized layer that loses a factor becomes a plain
    `nn.Sequential`. That the second alone reads the outputs of the first is for the caller to know
    (`rankfold.deployment`). Changes `model`. Raises PlanError for modules that are not there or
    cannot be merged.
    """
    for names in pairs:
        modules = dict(model.named_modules())
        first, second = (modules.get(name) for name in names)
        both = None if first is None or second is None else merged(first, second)
        if first is None or second is None or both is None:
            raise PlanError(f"the model has no '{names[0]}' and '{names[1]}' that can be merged")
        kept, gone = (first, second) if is_layer(first) else (second, first)
        nothing = nn.Identity().train(gone.training)
        model = put_in_place(model, {kept: both, gone: nothing})
    return put_in_place(model, dict(_without_factors(model)))


def merged(first: nn.Module, second: nn.Module) -> Layer | None:
    """One layer that does what `second(first(x))` does in eval mode.

    A batch norm with a layer on either side of it, or two layers of which the second takes one
    place at a time; of groups and paddings those that leave it exact. None if they are no such
    modules or if of two layers the product has more parameters, or MACs. It depends on types and
    shapes alone. The type, geometry and dtype are those of the layer, or of the first
    one; it is trainable if any part is, and in training mode if both are. Computed in float64.
    """
    if is_layer(first) and is_norm(second):
        return _scale_outputs(cast(Any, first), cast(Any, second))
    if is_norm(first) and is_layer(second):
        return _scale_inputs(cast(Any, first), cast(Any, second))
    if is_layer(first) and is_layer(second):
        return _multiply_if_cheaper(cast(Any, first), cast(Any, second))
    return None


def is_layer(module: nn.Module) -> bool:
    """Whether it is a linear layer or convolution of torch's own, of real and dense weights."""
    if type(module) not in LAYERS:
        return False
    weight = cast(Layer, module).weight
    return weight.is_floating_point() and weight.layout == torch.strided


def is_norm(module: nn.Module) -> bool:
    """Whether it is a batch norm of torch's own that in eval mode is a fixed affine map."""
    return type(module) in NORMS and cast(Norm, module).running_var is not None


def channel_dimension(layer: nn.Module) -> int:
    """The dimensions of a tensor whose dimension 1, which batch norm scales, the layer makes."""
    return 2 if isinstance(layer, nn.Linear) else cast(Layer, layer).weight.dim()


def merge_readouts(model: nn.Module, readers: Mapping[str, str]) -> nn.Module:
    """The model in which linear layers have taken in the readouts of the forms that they read.

    `readers` has, by the name of a form with a readout, the name of the linear layer, dense or
    factorized, that alone reads its outputs (`rankfold.analysis.readers`). What is left of the form
    is the smaller recurrent layer of torch's own. Where the reader does not begin with a linear
    layer of that width the readout stays: it depends on shapes alone, never on weights. Changes
    `model`. Raises PlanError for a name that is none of a layer.
    """
    modules = dict(model.named_modules())
    merged_layers: dict[nn.Module, nn.Module] = {}
    for name, reader in readers.items():
        if name not in modules or reader not in modules:
            raise PlanError(f"the model has no layers '{name}' and '{reader}' to merge")
        form, first = modules[name], modules[reader]
        if isinstance(first, nn.Sequential):
            first = first[0]
        if not isinstance(form, ReducedStates) or type(first) is not nn.Linear:
            continue
        if form.readout.out_features == first.in_features:
            merged_layers[form] = _without_readout(form)
            merged_layers[first] = multiply(form.readout, first)
    return put_in_place(model, merged_layers)


def planned_form(
    method: Method, layer: nn.Module, rank: Rank, reader: str | None = None
) -> nn.Module:
    """The skeleton of what will be in the layer's place, once a reader has taken in its readout.

    What the reader itself saves by that is not seen here.
    """
    form = reduction.skeleton(method, layer, rank)
    return _without_readout(form) if reader is not None else form


def _without_readout(form: nn.Module) -> nn.Module:
    return form.recurrent if isinstance(form, ReducedStates) else form


def _without_factors(model: nn.Module) -> Iterable[tuple[nn.Module, nn.Module]]:
    """The factorized layers that have lost a factor, and what they are now."""
    for module in model.modules():
        is_form = isinstance(module, nn.Sequential) and hasattr(module, "to_dense")
        if is_form and any(type(one) is nn.Identity for one in cast(Any, module)):
            yield module, nn.Sequential(*cast(Any, module)).train(module.training)


def multiply(first: Dense, second: Dense) -> Dense:
    """`second(first(x))` as one layer: of two linear ones, or of a convolution and a 1x1 one."""
    matrix = second.weight.detach().double().flatten(1)
    weight = torch.einsum("om,mi...->oi...", matrix, first.weight.detach().double())
    bias = None
    if first.bias is not None or second.bias is not None:
        bias = _bias_of(second) + matrix @ _bias_of(first)
    made = _layer_like(first, second, weight, bias)
    if isinstance(made, nn.Linear):
        made.out_features = len(weight)
    else:
        made.out_channels = len(weight)
    return made


def _multiply_if_cheaper(first: Layer, second: Layer) -> Layer | None:
    if type(first) is not type(second) or isinstance(first, TRANSPOSED):
        return None
    if not isinstance(second, nn.Linear):
        one_place = all(value == 1 for value in (*second.kernel_size, *second.stride))
        grouped = second.groups > 1 or cast(Any, first).groups > 1
        if not one_place or grouped or _pads(second):
            return None
    outputs, middle = second.weight.shape[:2]
    if len(first.weight) != middle:
        return None
    # Both work at the same places: what has fewer weights has fewer MACs.
    weights = first.weight[0].numel() * outputs
    saved = first.weight.numel() + second.weight.numel() - weights
    biases = sum(len(one.bias) for one in (first, second) if one.bias is not None)
    if saved < max(0, outputs - biases if biases else 0):
        return None
    return multiply(first, cast(Dense, second))


def _pads(layer: Any) -> bool:
    if isinstance(layer.padding, str):
        return layer.padding == "same" and any(length > 1 for length in layer.kernel_size)
    return any(layer.padding)


def _scale_outputs(layer: Layer, norm: Norm) -> Layer | None:
    scale, shift = affine(norm)
    weight = layer.weight.detach().double()
    groups = cast(Any, layer).groups if isinstance(layer, TRANSPOSED) else 1
    # Outputs are the first mode of a weight, but the second within each group if it is transposed.
    blocks = weight.unflatten(0, (groups, -1))
    outputs = 2 if isinstance(layer, TRANSPOSED) else 1
    if groups * blocks.shape[outputs] != norm.num_features:
        return None
    weight = (blocks * _along(outputs, scale.unflatten(0, (groups, -1)), blocks)).flatten(0, 1)
    return _layer_like(layer, norm, weight, shift + scale * _bias_of(layer))


def _scale_inputs(norm: Norm, layer: Layer) -> Layer | None:
    if isinstance(layer, TRANSPOSED):
        return None
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    # Zeros around the input would have to be zeros after the batch norm.
    if not isinstance(layer, nn.Linear) and layer.padding_mode == "zeros" and _pads(layer):
        return None
    blocks = layer.weight.detach().double().unflatten(0, (groups, -1))
    if groups * blocks.shape[2] != norm.num_features:
        return None
    scale, shift = (values.unflatten(0, (groups, -1)) for values in affine(norm))
    added = (blocks * _along(2, shift, blocks)).flatten(2).sum(2).flatten()
    weight = (blocks * _along(2, scale, blocks)).flatten(0, 1)
    return _layer_like(layer, norm, weight, _bias_of(layer) + added)


def _along(mode: int, values: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Values (groups, n) so shaped that they multiply the n of this mode of each group's block."""
    shape = [1] * blocks.dim()
    shape[0], shape[mode] = values.shape
    return values.reshape(shape)


def affine(norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift (channels,) of a batch norm in eval mode, in float64."""
    mean, variance = cast(Any, norm).running_mean.double(), cast(Any, norm).running_var.double()
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach().double()


def _bias_of(layer: Layer) -> torch.Tensor:
    """In float64, zeros where there is none."""
    if layer.bias is not None:
        return layer.bias.detach().double()
    outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return torch.zeros(outputs, dtype=torch.float64, device=layer.weight.device)


def _layer_like(
    layer: Any, other: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None
) -> Any:
    """The layer with this weight and bias, trainable if it or the other is."""
    trained = any(own.requires_grad for module in (layer, other) for own in module.parameters())
    own, contiguous = layer.weight, torch.contiguous_format
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(own.dim(), contiguous)
    # A 1x1 kernel is of both formats; which one was meant, its strides tell.
    meant = torch.empty(own.shape, device="meta", memory_format=last).stride() == own.stride()
    stored = last if meant else contiguous
    laid_out = torch.empty(weight.shape, dtype=own.dtype, device=own.device, memory_format=stored)
    made = copy.deepcopy(layer)
    made.weight = nn.Parameter(laid_out.copy_(weight), trained)
    made.bias = None if bias is None else nn.Parameter(bias.to(own.dtype), trained)
    return made.train(layer.training and other.training)
