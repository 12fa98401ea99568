"""Groups of weights that can leave a network together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal, get_args

import torch
from torch import nn

from rankfold.errors import RankfoldError
from rankfold.layers import CONVOLUTIONS, TRANSPOSED
from rankfold.narrowing import NORMS
from rankfold.sparsity.shadows import FIXED
from rankfold.sparsity.watch import LayerChannels, NormChannels, Structure

Kind = Literal["shapes", "filters", "channels", "ranks", "depth"]
KINDS: tuple[Kind, ...] = get_args(Kind)  # what is within others first

NO_GROUP = -1


@dataclass(frozen=True)
class Slices:
    """Which group each number of a parameter or buffer belongs to."""

    name: str
    groups: torch.Tensor  # broadcasts to the parameter: the number of a group, or NO_GROUP

    def to(self, device: torch.device) -> "Slices":
        return replace(self, groups=self.groups.to(device))


@dataclass(frozen=True)
class Groups:
    """The groups of one kind that a network has.

    shapes    the weights of one input at one place of the kernel, of all filters of a convolution
    filters   what makes one channel: the filters and biases of all layers that are added up in it,
              or scale and shift of the norms that follow them
    channels  what reads one channel: of all layers that do, the weights of that input
    ranks     a rank-one term of a factorized layer: what makes a channel between two factors of it,
              and what reads it
    depth     the last layer, or the last norm, of a residual branch
    """

    kind: Kind
    sizes: torch.Tensor  # (groups,) how many numbers are 0 when the group is
    measured: tuple[Slices, ...]  # whose norm is the group's, and which shrink with it
    cleared: tuple[Slices, ...]  # what is put to 0 with the group, and not before

    @property
    def count(self) -> int:
        return len(self.sizes)

    def to(self, device: torch.device) -> "Groups":
        """With its numbers there: a step would wait for each of them to be sent."""
        measured, cleared = (
            tuple(slices.to(device) for slices in one) for one in (self.measured, self.cleared)
        )
        return Groups(self.kind, self.sizes.to(device), measured, cleared)


def find_groups(
    model: nn.Module,
    structure: Structure,
    zeros_reach: torch.Tensor,
    over: Sequence[Kind],
    layers: str | Sequence[str],
) -> tuple[Groups, ...]:
    """The groups of these kinds, of layers whose names match one of the patterns.

    `zeros_reach`: (channels,), whether it helps that what makes a channel is 0.
    Filters and channels of what several layers make or read are taken where all of these layers
    match. Raises RankfoldError for a kind that there is not, or if there is no group at all.
    """
    patterns = [layers] if isinstance(layers, str) else list(layers)
    for kind in over:
        if kind not in KINDS:
            raise RankfoldError(f"no groups '{kind}'; there are {', '.join(KINDS)}")
    finder = _Finder(model, structure, zeros_reach, patterns)
    found = tuple(groups for kind in KINDS if kind in over for groups in finder.of(kind))
    if not found:
        raise RankfoldError(
            f"no {' or '.join(over)} of {', '.join(patterns)} can be taken out of this network"
        )
    return found


class _Finder:
    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        zeros_reach: torch.Tensor,
        patterns: Sequence[str],
    ) -> None:
        self.structure, self.zeros_reach, self.patterns = structure, zeros_reach, patterns
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.norms = {norm.name: norm for norm in structure.norms}
        self.layers = {layer.name: layer for layer in structure.layers}
        self.followed = {layer.norm: layer for layer in structure.layers if layer.norm}
        self.forms = [name for name, module in model.named_modules() if hasattr(module, "to_dense")]

    def of(self, kind: Kind) -> Iterator[Groups]:
        """None, or one."""
        if kind == "shapes":
            found = self._shapes()
        elif kind == "depth":
            found = self._depth()
        else:
            found = self._channels(kind)
        if found is not None and found.count:
            yield found

    def _matches(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.patterns)

    def _form_of(self, name: str) -> str | None:
        """The factorized layer that a layer is a factor of."""
        inside = (form for form in self.forms if not form or name.startswith(form + "."))
        return max(inside, key=len, default=None)

    def _channels(self, kind: Kind) -> Groups | None:
        """Filters, channels or ranks."""
        numbers = self._numbers(kind)
        measured: list[Slices] = []
        cleared: list[Slices] = []
        if kind in ("filters", "ranks"):
            for layer in self.structure.layers:
                # A filter that a norm follows can be scaled at will: what counts is the norm's.
                scaled = layer.norm is not None and self.norms[layer.norm].module.weight is not None
                (cleared if scaled else measured).extend(_filters(layer, numbers[layer.outputs]))
            for norm in self.norms.values():
                measured += _scale_and_shift(norm, numbers[norm.channels])
                cleared += _running_mean(norm, numbers[norm.channels])
        if kind in ("channels", "ranks"):
            for layer in self.structure.layers:
                if layer.groups == 1:
                    measured.append(_columns(layer, numbers[layer.inputs]))
        return self._groups(kind, int(numbers.max()) + 1, measured, cleared)

    def _numbers(self, kind: Kind) -> torch.Tensor:
        """Of each channel the group, or NO_GROUP."""
        count = self.structure.count
        made, read, unmatched = torch.zeros(3, count, dtype=torch.bool)
        forms: list[set[str | None]] = [set() for _ in range(count)]
        for layer in self.structure.layers:
            reads = layer.inputs if layer.groups == 1 else layer.inputs[:0]
            made[layer.outputs] = True
            read[reads] = True
            if not self._matches(layer.name):
                if kind != "channels":
                    unmatched[layer.outputs] = True
                if kind != "filters":
                    unmatched[reads] = True
            for channel in torch.cat([layer.outputs, layer.inputs]).unique().tolist():
                forms[channel].add(self._form_of(layer.name))
        for norm in self.norms.values():
            for channel in norm.channels.unique().tolist():
                forms[channel].add(None)
        inner = torch.tensor([len(one) == 1 and None not in one for one in forms])
        wanted = made & read & ~unmatched & (inner if kind == "ranks" else ~inner)
        if kind == "filters":
            wanted &= self.zeros_reach
        wanted[FIXED] = False
        numbers = torch.full((count,), NO_GROUP)
        numbers[wanted] = torch.arange(int(wanted.sum()))
        return numbers

    def _shapes(self) -> Groups | None:
        measured, count = [], 0
        for layer in self.structure.layers:
            weight = layer.module.weight
            plain = isinstance(layer.module, CONVOLUTIONS) and layer.groups == 1
            if plain and weight[0, 0].numel() > 1 and self._matches(layer.name):
                numbers = count + torch.arange(weight[0].numel()).view(1, *weight.shape[1:])
                measured.append(Slices(_named(layer.name, "weight"), numbers))
                count += weight[0].numel()
        return self._groups("shapes", count, measured, [])

    def _depth(self) -> Groups | None:
        measured: list[Slices] = []
        cleared: list[Slices] = []
        sizes: list[int] = []
        for branch in self.structure.branches:
            norm, layer = self.norms.get(branch.last), self.layers.get(branch.last)
            number = torch.tensor(len(sizes))
            if not self._matches(branch.last):
                continue
            if layer is not None:
                measured += _filters(layer, number.expand(len(layer.outputs)))
            elif norm is not None and isinstance(norm.module, NORMS) and norm.module.affine:
                own = number.expand(len(norm.channels))
                measured += _scale_and_shift(norm, own)
                cleared += _running_mean(norm, own)
                if (before := self.followed.get(norm.name)) is not None:
                    cleared += _filters(before, number.expand(len(before.outputs)))
            else:
                continue
            modules = [self.layers.get(name) or self.norms[name] for name in branch.modules]
            owned = [own for one in modules for own in one.module.parameters(recurse=False)]
            sizes.append(sum(own.numel() for own in owned))
        if not sizes:
            return None
        return Groups("depth", torch.tensor(sizes), tuple(measured), tuple(cleared))

    def _groups(
        self, kind: Kind, count: int, measured: Sequence[Slices], cleared: Sequence[Slices]
    ) -> Groups | None:
        measured = [one for one in measured if (one.groups != NO_GROUP).any()]
        cleared = [one for one in cleared if (one.groups != NO_GROUP).any()]
        sizes = torch.zeros(count, dtype=torch.long)
        for one in (*measured, *cleared):
            if one.name in self.parameters:
                each = self.parameters[one.name].numel() // one.groups.numel()
                inside = one.groups[one.groups != NO_GROUP]
                sizes += each * torch.bincount(inside, minlength=count)
        return Groups(kind, sizes, tuple(measured), tuple(cleared)) if count else None


def _named(module: str, own: str) -> str:
    return f"{module}.{own}" if module else own


def _spread(numbers: torch.Tensor, axis: int, weight: torch.Tensor) -> torch.Tensor:
    return numbers.view([-1 if mode == axis else 1 for mode in range(weight.dim())])


def _filters(layer: LayerChannels, numbers: torch.Tensor) -> Iterator[Slices]:
    """Of the groups of the outputs."""
    weight, axis = layer.module.weight, 0
    of_weight = numbers
    if isinstance(layer.module, TRANSPOSED):
        # All channels of a group of the layer are joined: its inputs tell what its outputs would.
        if layer.groups == 1:
            axis = 1
        else:
            each = len(layer.outputs) // layer.groups
            of_weight = numbers[::each].repeat_interleave(len(layer.inputs) // layer.groups)
    yield Slices(_named(layer.name, "weight"), _spread(of_weight, axis, weight))
    if layer.module.bias is not None:
        yield Slices(_named(layer.name, "bias"), numbers)


def _columns(layer: LayerChannels, numbers: torch.Tensor) -> Slices:
    """Of the groups of the inputs."""
    axis = 0 if isinstance(layer.module, TRANSPOSED) else 1
    return Slices(_named(layer.name, "weight"), _spread(numbers, axis, layer.module.weight))


def _scale_and_shift(norm: NormChannels, numbers: torch.Tensor) -> Iterator[Slices]:
    if isinstance(norm.module, NORMS) and norm.module.affine:
        yield Slices(_named(norm.name, "weight"), numbers)
        yield Slices(_named(norm.name, "bias"), numbers)


def _running_mean(norm: NormChannels, numbers: torch.Tensor) -> Iterator[Slices]:
    """Without it, a norm makes something of nothing."""
    if isinstance(norm.module, NORMS) and norm.module.running_mean is not None:
        yield Slices(_named(norm.name, "running_mean"), numbers)
