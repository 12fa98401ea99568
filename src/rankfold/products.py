"""Whether layers made of small tensors multiply by these, or by their whole weight.

Fewer products are not always less time. A structured layer that is not trained may keep its weight
written out, and is then as fast as a dense one: both ways are timed where the layer is used, and
the faster one is taken. What both take is said by the layer and by `measure`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rankfold.batches import Forward, device_of, run, running
from rankfold.layers import StructuredLinear
from rankfold.measure import latencies

_SECONDS = 0.2  # of timing for each way of each layer


@dataclass(frozen=True)
class ProductTimes:
    """What the product of one layer takes in one forward pass of the network, in milliseconds."""

    name: str
    by_factors: float
    by_weight: float


def choose_products(
    model: nn.Module, batch: Any, *, forward: Forward = run, seconds: float = _SECONDS
) -> tuple[ProductTimes, ...]:
    """Have every structured layer multiply, in eval mode, in the way that is faster on a batch.

    The network is run once on the batch; each `StructuredLinear` is then timed in both ways on the
    first inputs that it got, on the device and in the dtype that it has them in, the two taking
    turns. The weight that a layer keeps takes memory, not parameters, and is made anew after
    training. Layers that the pass does not reach are left as they are. Returns what was found, in
    the order of the network's modules.
    """
    layers = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, StructuredLinear)
    }
    if not layers:
        return ()
    device = device_of(model)
    with running(model), torch.no_grad():
        with _first_inputs(layers) as inputs:
            forward(model, batch)
        return tuple(
            _choose(name, layer, inputs[name], device, seconds)
            for name, layer in layers.items()
            if name in inputs
        )


def _choose(
    name: str, layer: StructuredLinear, given: torch.Tensor, device: torch.device, seconds: float
) -> ProductTimes:
    weight = layer.to_weight()

    def by_factors() -> torch.Tensor:
        layer.uses_weight = False
        return layer(given)

    def by_weight() -> torch.Tensor:
        layer.uses_weight, layer.cached = True, weight
        return layer(given)

    factors, whole = latencies([by_factors, by_weight], device, seconds=seconds)
    layer.use_weight(whole < factors)
    layer.product_times = factors, whole
    return ProductTimes(name, factors, whole)


@contextmanager
def _first_inputs(layers: dict[str, StructuredLinear]) -> Iterator[dict[str, torch.Tensor]]:
    """What each layer is first called with while the context lasts."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            found.setdefault(name, given[0].detach().clone())

        return hook

    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
