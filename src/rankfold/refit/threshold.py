"""Fitting through a ReLU: what follows a response, and what may stand in for it.

Zhang, Zou, He, Sun: Accelerating very deep convolutional networks for classification and detection.
IEEE TPAMI 38, 2016, section 3.2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rankfold.batches import Forward
from rankfold.merging import affine
from rankfold.refit.positions import run_watched


@dataclass(frozen=True)
class Threshold:
    """What follows a response: z = scale * y + shift (a batch norm, or 1 and 0), then relu(z)."""

    scale: torch.Tensor
    shift: torch.Tensor

    def before(self, responses: torch.Tensor) -> torch.Tensor:
        return responses * self.scale + self.shift

    def of(self, responses: torch.Tensor) -> torch.Tensor:
        return self.before(responses).clamp_min(0)

    def undo(self, before: torch.Tensor) -> torch.Tensor:
        """Responses of these values before the ReLU."""
        return (before - self.shift) / self.scale


def read_by_relu(
    model: nn.Module, layers: Sequence[str], batch: Any, forward: Forward
) -> dict[str, Threshold]:
    """Of the layers whose output an `nn.ReLU` takes, through a batch norm or not, what follows."""
    names = {module: name for name, module in model.named_modules() if name in set(layers)}
    made: dict[int, tuple[str, _BatchNorm | None]] = {}  # by tensor
    alive: list[Any] = []  # so that no tensor takes the place of another
    found: dict[str, Threshold] = {}

    def note(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, torch.Tensor):
            return
        alive.append(output)
        if module in names:
            made[id(output)] = (names[module], None)
        elif given and id(given[0]) in made:
            name, norm = made[id(given[0])]
            if isinstance(module, _BatchNorm) and norm is None:
                made[id(output)] = (name, module)
            elif isinstance(module, nn.ReLU):
                threshold = _threshold(norm, cast(Any, model.get_submodule(name)))
                if threshold is not None:
                    found[name] = threshold

    leaves = [module for module in model.modules() if next(module.children(), None) is None]
    run_watched(model, batch, 0, forward, dict.fromkeys(leaves, note))
    return found


def _threshold(norm: Any, layer: Any) -> Threshold | None:
    """None for a batch norm that cannot be undone: of the batch's statistics, or a scale of 0."""
    outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    ones = torch.ones(outputs, dtype=torch.float64, device=layer.weight.device)
    if norm is None:
        return Threshold(ones, torch.zeros_like(ones))
    if norm.running_mean is None or norm.running_var is None:
        return None
    scale, shift = affine(norm)
    if not (scale != 0).all():
        return None
    return Threshold(scale, shift)


def stand_in(target: torch.Tensor, predicted: torch.Tensor, tie: float) -> torch.Tensor:
    """Z of least (target - relu(z))² + tie (z - predicted)², element by element.

    The better of the best z below 0 and the best above (Zhang et al. 2016, equations 9 and 10).
    """
    below = predicted.clamp_max(0)
    above = ((target + tie * predicted) / (1 + tie)).clamp_min(0)
    cost_below = target.square() + tie * (below - predicted).square()
    cost_above = (target - above).square() + tie * (above - predicted).square()
    return torch.where(cost_below < cost_above, below, above)
