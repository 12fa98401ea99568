"""What every factorized layer is: factors, mostly in a chain, that represent one dense layer."""

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import nn

from rankfold.errors import RankError, TensorError

# What methods see; of grouped and transposed convolutions they see the plain ones within.
Dense = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


class Form(Protocol):
    """A factorized layer: an `nn.Sequential`, or `nn.ModuleList`, whose last holds the bias."""

    def to_dense(self) -> nn.Module:
        """The dense layer that this one represents, with copies of its parameters."""


def check_ranks(ranks: Sequence[int], limits: Sequence[int], layer: nn.Module) -> None:
    """Raise RankError unless 1 <= rank <= limit for each pair."""
    if len(ranks) != len(limits) or not all(
        1 <= rank <= limit for rank, limit in zip(ranks, limits, strict=False)
    ):
        bounds = ", ".join(f"1..{limit}" for limit in limits)
        raise RankError(f"rank {tuple(ranks)} is outside ({bounds}) of {layer}")


def factors_of(form: nn.Module) -> list[Any]:
    """The modules with a weight that a form is made of, first factor first."""
    return [module for module in form.modules() if hasattr(module, "weight")]


def assign_factors(
    form: nn.Sequential | nn.ModuleList, weights: Sequence[torch.Tensor], layer: nn.Module
) -> None:
    """Make `weights`, first factor first, and the bias of `layer` the parameters of `form`.

    Device, dtype, `requires_grad` and training mode become those of `layer`; a factor that the form
    has frozen stays so. A 1x1 kernel may be given as a matrix. The parameters are copies: `layer`
    and `form` share no memory. Raises TensorError for what the dtype cannot hold.
    """
    dense = cast(Any, layer)
    for factor, weight in zip(factors_of(form), weights, strict=True):
        weight = _stored(weight, dense.weight)
        factor.weight = nn.Parameter(
            weight.reshape(factor.weight.shape).contiguous(),
            dense.weight.requires_grad and factor.weight.requires_grad,
        )
    if getattr(dense, "bias", None) is not None:  # an embedding has none
        cast("Any", form[-1]).bias = nn.Parameter(
            dense.bias.detach().clone(), dense.bias.requires_grad
        )
    form.train(layer.training)


def parameter_like(value: torch.Tensor, like: torch.Tensor) -> nn.Parameter:
    """A parameter of this value, copied, on the device of another, of its dtype, trained or not."""
    return nn.Parameter(_stored(value, like).contiguous(), like.requires_grad)


def _stored(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A copy on the device of another and in its dtype; TensorError if that is too narrow."""
    found = value.detach().to(like.device, like.dtype, copy=True)
    if not (found.is_meta or found.isfinite().all()):
        raise TensorError(
            f"a factor has numbers beyond {like.dtype}, up to {value.abs().max().item():.3g}: "
            "scale the layer's weight down, or factorize it in a wider dtype"
        )
    return found


def fill_dense(dense: nn.Module, weight: torch.Tensor, form: nn.Sequential | nn.ModuleList) -> None:
    """Give `dense`, built on the meta device, copies of a weight and of the bias of `form`.

    `weight` is the product of the factors. The result is trainable where the form is, and in its
    mode.
    """
    trainable = any(factor.weight.requires_grad for factor in factors_of(form))
    cast("Any", dense).weight = nn.Parameter(weight.detach().clone(), trainable)
    bias = cast("Any", form[-1]).bias
    if bias is not None:
        cast("Any", dense).bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    dense.train(form.training)
