"""Linear layers whose weight is made of small tensors and need not be written out."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from rankfold.layers.form import fill_dense


class Factor(nn.Module):
    """One tensor of those that a weight is made of. The last of them has the layer's bias."""

    bias: nn.Parameter | None

    def __init__(
        self,
        shape: Sequence[int],
        bias: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """A tensor of this shape, not initialised, and a bias of so many zeros or none."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(tuple(shape), device=device, dtype=dtype))
        if bias is None:
            self.register_parameter("bias", None)
        else:
            self.bias = nn.Parameter(torch.zeros(bias, device=device, dtype=dtype))

    def extra_repr(self) -> str:
        return "x".join(map(str, self.weight.shape))


class StructuredLinear(nn.ModuleList):
    """y = W x + b, W (out, in) a function of the factors that are its modules.

    A subclass says what the weight is (`to_weight`), how rows of inputs are multiplied by it
    without writing it out (`product`), and what variance its factors have at first
    (`reset_parameters`).

    Where the product with the whole weight is faster than that with the factors, `use_weight(True)`
    has a layer in eval mode write its weight out once, and multiply by that until it is trained.
    """

    cached: torch.Tensor | None
    __repr__ = nn.Module.__repr__  # that of a list has no place for the layer's own facts

    def __init__(
        self,
        in_features: int,
        out_features: int,
        shapes: Sequence[Sequence[int]],
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Factors of these shapes, with initial values for training from scratch."""
        last = len(shapes) - 1
        super().__init__(
            Factor(shape, out_features if bias and place == last else None, device, dtype)
            for place, shape in enumerate(shapes)
        )
        self.in_features, self.out_features = in_features, out_features
        self.uses_weight = False
        # Milliseconds by the factors and by the weight, where `choose_products` has timed both.
        self.product_times: tuple[float, float] | None = None
        self.register_buffer("cached", None, persistent=False)
        self.reset_parameters()

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of inputs times the weight: (n, in) to (n, out), without the bias."""
        raise NotImplementedError

    def to_weight(self) -> torch.Tensor:
        """The weight, (out, in), differentiable."""
        raise NotImplementedError

    def reset_parameters(self, gain: float = 1.0) -> None:
        """Random factors whose weight has entries of mean 0 and variance gain² / in; zero bias.

        So outputs have the scale of the inputs; behind a ReLU with a gain of √2 (He et al. 2015).
        """
        raise NotImplementedError

    @property
    def factors(self) -> list[torch.Tensor]:
        return [factor.weight for factor in self]  # type: ignore[misc]

    @property
    def keeps_weight(self) -> bool:
        """Whether the layer, as it is, multiplies by its whole weight, kept from call to call."""
        return self.uses_weight and not self.training

    @property
    def _bias(self) -> torch.Tensor | None:
        return self[-1].bias  # type: ignore[return-value]

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.keeps_weight:
            return functional.linear(tensor, self.written_out(), self._bias)
        rows = tensor.reshape(math.prod(tensor.shape[:-1]), self.in_features)
        made = self.product(rows).reshape(*tensor.shape[:-1], self.out_features)
        return made if self._bias is None else made + self._bias

    def use_weight(self, uses_weight: bool) -> None:
        """Whether to multiply by the whole weight in eval mode, or by the factors."""
        self.uses_weight, self.cached = uses_weight, None

    def train(self, mode: bool = True) -> "StructuredLinear":
        self.cached = None
        return super().train(mode)

    def to_dense(self) -> nn.Linear:
        """The `nn.Linear` that this represents."""
        dense = nn.Linear(
            self.in_features,
            self.out_features,
            self._bias is not None,
            "meta",
            self.factors[0].dtype,
        )
        fill_dense(dense, self.to_weight(), self)
        return dense

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        said = self.said_of_products()
        return sizes if said is None else f"{sizes}, {said}"

    def said_of_products(self) -> str | None:
        """In which way the layer multiplies, and what both ways take; None if it was not timed."""
        if self.product_times is None:
            return None
        factors, weight = self.product_times
        by = "weight" if self.uses_weight else "factors"
        return f"by {by}: {factors:.3g} ms by factors, {weight:.3g} ms by weight"

    def written_out(self) -> torch.Tensor:
        """The weight in the factors' precision; in eval mode, without gradients, it is kept."""
        if self.cached is not None and not torch.is_grad_enabled():
            return self.cached
        with torch.autocast(self.factors[0].device.type, enabled=False):
            weight = self.to_weight()
        # What a program that is being made computes is none of this layer's own.
        if not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()):
            self.cached = weight
        return weight

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.cached = None
        super()._load_from_state_dict(*args, **kwargs)
