"""Group lasso by proximal steps."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from rankfold.batches import Forward, device_of, run, to_device
from rankfold.errors import RankfoldError
from rankfold.sparsity.groups import NO_GROUP, Groups, Kind, Slices, find_groups
from rankfold.sparsity.structure import find_structure, zeros_reach_readers


class GroupLasso:
    """The proximal step of strength * Σ √(size of g) ‖g‖ over the groups g of a network.

    Called with the network and the learning rate after every step of an optimizer: each group is
    scaled by max(0, 1 - t / ‖g‖), t = rate * strength * √size (Yuan and Lin 2006), so that groups
    that the loss does not hold become exactly 0. What groups there are is in `Groups`; over
    filters, channels, shapes and depth they are those of Wen et al. (2016), with two differences:

    - A group is all that has to be 0 for something to leave the network: the filters of all layers
      that make a channel of a residual sum, not of one of them.
    - A filter that a batch norm follows has no scale of its own: its group is measured by scale and
      shift of the norm, and the filter becomes 0 when these do.

    Kinds that overlap are stepped one after the other, the smaller groups first; that is the exact
    step where groups lie within each other (Jenatton et al. 2011), and not where they cross.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        *,
        strength: float = 1e-4,
        over: Sequence[Kind] = ("filters", "channels"),
        layers: str | Sequence[str] = "*",
        forward: Forward = run,
    ) -> None:
        """Of the groups that are seen while `model` runs on one batch, `example`.

        `layers` are patterns of names as in `fnmatch`. Raises RankfoldError for a strength that is
        negative, a kind of groups that is not known, and where there is no group at all; ModelError
        for a model that does not run.
        """
        if not strength >= 0:
            raise RankfoldError(f"a strength is not negative, {strength} is")
        self.strength = strength
        batch = to_device(example, device_of(model))
        structure = find_structure(model, batch, forward)
        reach = zeros_reach_readers(model, structure, batch, forward)
        found = find_groups(model, structure, reach, over, layers)
        self.groups = tuple(groups.to(device_of(model)) for groups in found)

    def __call__(self, model: nn.Module, learning_rate: float) -> None:
        """Step, in place."""
        tensors = self._tensors(model)
        with torch.no_grad():
            for groups in self.groups:
                norms = _norms(groups, tensors)
                least = learning_rate * self.strength * groups.sizes.to(norms).sqrt()
                kept = (1 - least / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_min(0)
                for one in groups.measured:
                    _scale(tensors[one.name], one, kept)
                for one in groups.cleared:
                    _scale(tensors[one.name], one, (kept > 0).to(kept))

    def zero_groups(self, model: nn.Module) -> dict[Kind, tuple[int, int]]:
        """By kind, how many groups are 0, and how many there are."""
        tensors = self._tensors(model)
        with torch.no_grad():
            return {
                one.kind: (int((_norms(one, tensors) == 0).sum()), one.count) for one in self.groups
            }

    @staticmethod
    def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
        return {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }


def _norms(groups: Groups, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """(groups,), float32 or float64."""
    first = tensors[groups.measured[0].name]
    dtype = torch.promote_types(first.dtype, torch.float32)
    squares = torch.zeros(groups.count + 1, dtype=dtype, device=first.device)
    for one in groups.measured:
        tensor = tensors[one.name].detach()
        alone = [mode for mode in range(tensor.dim()) if one.groups.shape[mode] == 1]
        each = tensor.to(dtype).square()
        each = each.sum(alone, keepdim=True) if alone else each
        squares.index_add_(0, _places(one, groups.count).to(each.device), each.flatten())
    return squares[:-1].sqrt()


def _places(slices: Slices, count: int) -> torch.Tensor:
    """Where the groups are in a vector that has an entry more, for no group."""
    flat = slices.groups.flatten()
    return torch.where(flat == NO_GROUP, count, flat)


def _scale(tensor: torch.Tensor, slices: Slices, factors: torch.Tensor) -> None:
    padded = torch.cat([factors, factors.new_ones(1)])
    chosen = padded[_places(slices, len(factors)).to(factors.device)].view(slices.groups.shape)
    tensor.mul_(chosen.to(tensor))
