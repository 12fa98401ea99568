"""What is known of every number of a tensor: the channel that it belongs to, and whether it is 0.

Channels that have to stay or go together are joined as functions of torch are applied: the two
terms of a residual sum, what is concatenated, flattened, or read by a depthwise convolution.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rankfold.batches import map_tensors, tensors_of

aten = torch.ops.aten

FIXED = 0  # the channel of all that cannot be taken out

# What treats each number by itself, besides what torch says does.
_POINTWISE = {aten.hardswish, aten.hardswish_, aten._to_copy, aten.rsub, aten._prelu_kernel}
# What moves numbers about and changes none: applied to the channels' numbers as it is. In the first
# two, sizes or places may be written in the network's code, and would be wrong of fewer channels.
RESHAPES = frozenset(
    {
        *(aten.view, aten._unsafe_view, aten.reshape, aten.expand, aten.repeat),
        *(aten.pixel_shuffle, aten.pixel_unshuffle, aten.channel_shuffle),
        aten.native_channel_shuffle,
    }
)
SLICES = frozenset(
    {aten.slice, aten.select, aten.split, aten.split_with_sizes, aten.unbind, aten.index_select}
)
_MOVES = {
    *(*RESHAPES, *SLICES, aten.permute, aten.transpose, aten.t, aten.squeeze, aten.unsqueeze),
    *(aten.cat, aten.stack, aten.flip, aten.roll, aten.detach, aten.alias, aten.clone),
    aten.contiguous,
}
_VIEWS = {aten.view, aten._unsafe_view, aten.reshape}
# What works along the last axes, each channel by itself, and makes zeros of zeros.
_SPATIAL = {
    *(aten.max_pool1d, aten.max_pool2d_with_indices, aten.max_pool3d_with_indices),
    *(aten.mkldnn_max_pool2d, aten.mkldnn_max_pool3d),
    *(aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d),
    *(aten._adaptive_avg_pool2d, aten._adaptive_avg_pool3d, aten.adaptive_avg_pool1d),
    *(aten.adaptive_max_pool1d, aten.adaptive_max_pool2d, aten.adaptive_max_pool3d),
    *(aten.upsample_nearest1d, aten.upsample_nearest2d, aten.upsample_nearest3d),
    *(aten._upsample_nearest_exact1d, aten._upsample_nearest_exact2d),
    *(aten.upsample_linear1d, aten.upsample_bilinear2d, aten.upsample_bicubic2d),
    *(aten.upsample_trilinear3d, aten._upsample_bilinear2d_aa, aten._upsample_bicubic2d_aa),
    *(aten.reflection_pad1d, aten.reflection_pad2d, aten.reflection_pad3d),
    *(aten.replication_pad1d, aten.replication_pad2d, aten.replication_pad3d),
}
# What reads along the axes that it is told, and makes zeros of zeros.
_REDUCTIONS = {aten.mean, aten.sum, aten.amax, aten.amin}
_NORMALIZED = {aten._softmax, aten._log_softmax}


@dataclass
class Shadow:
    """Of a tensor, in its shape, stored once along the axes on which nothing depends."""

    tensor: torch.Tensor  # kept, so that no other gets its id
    channels: torch.Tensor  # numbers of channels, or FIXED
    zeros: torch.Tensor  # whether the number is 0 whatever goes into the network
    maker: str | None = None  # the module that made it, if only what keeps zeros came after
    direct: str | None = None  # the module whose very output it is
    step: int = 0
    before: int = 0  # the steps that it depends on, as bits
    reads: int = 0


class Channels:
    """The channels of a network, some of them joined."""

    def __init__(self) -> None:
        self._joined = [FIXED]

    def make(self, count: int) -> torch.Tensor:
        """So many new ones."""
        first = len(self._joined)
        self._joined.extend(range(first, first + count))
        return torch.arange(first, first + count)

    def join(self, one: torch.Tensor, other: torch.Tensor) -> None:
        """Have those that stand at the same place stay or go together; tensors broadcast."""
        first, second = torch.broadcast_tensors(one, other)
        pairs = torch.stack([once(first, second).flatten(), once(second, first).flatten()])
        for a, b in pairs.unique(dim=1).mT.tolist():
            a, b = self._find(a), self._find(b)
            self._joined[max(a, b)] = min(a, b)

    def fix(self, channels: torch.Tensor) -> None:
        """Have them stay."""
        self.join(channels, torch.tensor(FIXED))

    def roots(self, channels: torch.Tensor) -> torch.Tensor:
        """One number for all that are joined; FIXED for those that stay."""
        return torch.tensor([self._find(channel) for channel in channels.tolist()])

    def _find(self, channel: int) -> int:
        while self._joined[channel] != channel:
            self._joined[channel] = self._joined[self._joined[channel]]
            channel = self._joined[channel]
        return channel


class Shadows:
    """The shadows of the tensors that were met."""

    def __init__(self, fixing: Collection[Any] = frozenset()) -> None:
        """Channels that functions of `fixing` move, of `RESHAPES` or `SLICES`, stay."""
        self.channels = Channels()
        self.fixing = fixing
        self.sums: list[tuple[Shadow, Shadow]] = []
        """Of each sum of two tensors what was added."""
        self._known: dict[int, Shadow] = {}
        self._of_storage: dict[int, set[int]] = {}
        self._calls: list[tuple[int, str]] = []
        self._steps = 0

    def of(self, tensor: torch.Tensor) -> Shadow:
        """What is known; of a tensor from outside that it is fixed and may be anything."""
        if id(tensor) not in self._known:
            channels = torch.full((1,) * tensor.dim(), FIXED).expand(tensor.shape)
            zeros = torch.zeros((1,) * tensor.dim(), dtype=torch.bool).expand(tensor.shape)
            self.put(tensor, channels, zeros, [])
        return self._known[id(tensor)]

    def read(self, tensor: torch.Tensor) -> Shadow:
        """The same, counted."""
        shadow = self.of(tensor)
        shadow.reads += 1
        return shadow

    def put(
        self,
        tensor: torch.Tensor,
        channels: torch.Tensor,
        zeros: torch.Tensor,
        sources: Sequence[Shadow],
        maker: str | None = None,
        direct: str | None = None,
    ) -> Shadow:
        """Note what is known of a tensor that was made from others."""
        old = self._known.get(id(tensor))
        if old is None:
            self._steps += 1
        step = self._steps if old is None else old.step
        before = 1 << step
        for source in sources:
            before |= source.before
        shadow = Shadow(tensor, channels, zeros, maker, direct, step, before)
        shadow.reads = 0 if old is None else old.reads + 1
        self._known[id(tensor)] = shadow
        if direct is not None:
            self._calls.append((step, direct))
        self._of_storage.setdefault(storage_of(tensor), set()).add(id(tensor))
        return shadow

    def reads_of(self, tensor: int) -> int:
        """How often the tensor of this id was read."""
        return self._known[tensor].reads

    def calls_of(self, module: str) -> int:
        """How often a module made something."""
        return sum(maker == module for _, maker in self._calls)

    def makers_in(self, steps: int) -> list[str]:
        """The modules that made something in these steps, which are bits."""
        return list(dict.fromkeys(maker for step, maker in self._calls if steps >> step & 1))

    def fix(self, *tensors: torch.Tensor) -> None:
        """Have the channels of tensors stay, and of all that shares memory with them."""
        for tensor in tensors:
            self.read(tensor)
            for known in self._of_storage[storage_of(tensor)]:
                self.channels.fix(self._known[known].channels)

    def apply(
        self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], made: Any
    ) -> None:
        """Note what a function of torch made of its arguments."""
        if not isinstance(function, torch._ops.OpOverload):
            self.fix(*tensors_of((args, dict(kwargs), made)))
            return
        packet = function.overloadpacket
        name = packet._qualified_op_name.rpartition("::")[2]
        given = list(tensors_of((args, dict(kwargs))))
        outputs = list(tensors_of(made))
        if not given:
            return
        in_place = function._schema.is_mutable
        if in_place and not (name.endswith("_") and len(outputs) == 1 and outputs[0] is given[0]):
            self.fix(*given, *outputs)
        elif _is_pointwise(function) and len(outputs) == 1:
            self._pointwise(function, args, kwargs, given, outputs[0], in_place)
        elif in_place:
            self.fix(*given, *outputs)
        elif packet in _MOVES and not self._must_stay(packet, args, given):
            self._move(function, packet, args, kwargs, given, outputs)
        elif packet in _SPATIAL:
            axes = int(re.findall(r"([123])d", name)[0])
            self._along_last(axes, True, given[0], outputs[0])
        elif packet is aten.constant_pad_nd:
            value = args[2] if len(args) > 2 else kwargs.get("value", 0)
            self._along_last(len(args[1]) // 2, value == 0, given[0], outputs[0])
        elif packet in _REDUCTIONS:
            self._reduce(args, given[0], outputs[0])
        elif packet in _NORMALIZED:
            shadow = self.read(given[0])
            if varies(shadow.channels, args[1]):
                self.fix(given[0])
            self.put(outputs[0], shadow.channels, torch.zeros_like(shadow.zeros), [shadow])
        else:
            self.fix(*given)
            for output in outputs:
                self.put(output, self._fixed(output), self._unknown(output), self._all(given))

    def _must_stay(self, packet: Any, args: Sequence[Any], given: Sequence[torch.Tensor]) -> bool:
        """Whether the channels of what is moved are needed where they are."""
        channels = self.of(given[0]).channels
        if packet is aten.index_select:
            return varies(channels, args[1])
        return packet in self.fixing and any(varies(channels, a) for a in range(channels.dim()))

    def _all(self, tensors: Sequence[torch.Tensor]) -> list[Shadow]:
        return [self.of(tensor) for tensor in tensors]

    @staticmethod
    def _fixed(tensor: torch.Tensor) -> torch.Tensor:
        return torch.full((1,) * tensor.dim(), FIXED).expand(tensor.shape)

    @staticmethod
    def _unknown(tensor: torch.Tensor) -> torch.Tensor:
        return torch.zeros((1,) * tensor.dim(), dtype=torch.bool).expand(tensor.shape)

    def _pointwise(
        self,
        function: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        given: Sequence[torch.Tensor],
        made: torch.Tensor,
        in_place: bool,
    ) -> None:
        """Channels at the same place are joined; one that many are combined with stays."""
        shadows = [self.read(tensor) for tensor in given]
        if len(shadows) == 2 and function.overloadpacket in (aten.add, aten.add_):
            self.sums.append((shadows[0], shadows[1]))
        laid = [_broadcast(shadow.channels, made) for shadow in shadows]
        order = sorted(range(len(laid)), key=lambda i: -_count(laid[i]))
        channels = laid[order[0]]
        for index in order[1:]:
            aligned = _aligned(shadows[index].channels, made.dim())
            axes = range(made.dim())
            if any(aligned.shape[a] == 1 < made.shape[a] and varies(channels, a) for a in axes):
                self.channels.fix(shadows[index].channels)
            else:
                self.channels.join(channels, laid[index])
        zeros = self._zeros(function, args, kwargs, shadows, made)
        alone = len(shadows) == 1 and _keeps_zero(function, args, kwargs)
        if in_place and not alone and len(self._of_storage[storage_of(made)]) > 1:
            self.fix(made)  # what sees it by another name may have thought it 0
        self.put(made, channels, zeros, shadows, shadows[0].maker if alone else None)

    def _zeros(
        self,
        function: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        shadows: Sequence[Shadow],
        made: torch.Tensor,
    ) -> torch.Tensor:
        zeros = [_broadcast(shadow.zeros, made) for shadow in shadows]
        packet = function.overloadpacket
        if packet in (aten.mul, aten.mul_) and len(zeros) == 2:
            return zeros[0] | zeros[1]
        if packet in (aten.div, aten.div_) and len(zeros) == 2:
            return zeros[0] & ~zeros[1]
        if packet is aten._prelu_kernel:
            return zeros[0]
        if not made.is_floating_point() or not _keeps_zero(function, args, kwargs):
            return torch.zeros_like(zeros[0])
        found = zeros[0]
        for other in zeros[1:]:
            found = found & other
        return found

    def _move(
        self,
        function: Any,
        packet: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        given: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
    ) -> None:
        shadows = [self.read(tensor) for tensor in given]
        moved = []
        for field in ("channels", "zeros"):

            def shadow_of(tensor: torch.Tensor, field: str = field) -> torch.Tensor:
                if not tensor.is_floating_point():
                    return tensor.cpu()
                return getattr(self.of(tensor), field)

            given_now = map_tensors(list(args), shadow_of)
            call = torch.reshape if packet in _VIEWS else function
            named = {} if packet in (*_VIEWS, aten.clone) else kwargs
            result = call(*given_now, **named)
            moved.append([result] if isinstance(result, torch.Tensor) else list(result))
        if packet in _VIEWS:
            for channels in moved[0]:
                self._join_split(channels)
        maker = shadows[0].maker if len(shadows) == 1 else None
        for output, channels, zeros in zip(outputs, *moved, strict=True):
            self.put(output, _compact(channels), _compact(zeros), shadows, maker)

    def _join_split(self, channels: torch.Tensor) -> None:
        """What an axis was split into has to stay as many times as many: all rows of a column."""
        axes = [axis for axis in range(channels.dim()) if varies(channels, axis)]
        for axis in axes[:-1]:
            self.channels.join(channels, channels.narrow(axis, 0, 1))

    def _along_last(
        self, axes: int, keeps_zero: bool, given: torch.Tensor, made: torch.Tensor
    ) -> None:
        shadow = self.read(given)
        last = tuple(range(given.dim() - axes, given.dim()))
        if any(varies(shadow.channels, axis) for axis in last):
            self.fix(given)
            self.put(made, self._fixed(made), self._unknown(made), [shadow])
            return
        channels, zeros = shadow.channels, shadow.zeros
        for axis in last:
            channels = channels.narrow(axis, 0, 1)
            zeros = zeros.all(axis, keepdim=True)
        zeros = (zeros & keeps_zero).expand(made.shape)
        maker = shadow.maker if keeps_zero else None
        self.put(made, channels.expand(made.shape), zeros, [shadow], maker)

    def _reduce(self, args: Sequence[Any], given: torch.Tensor, made: torch.Tensor) -> None:
        shadow = self.read(given)
        whole = len(args) < 2 or not isinstance(args[1], list | tuple) or not args[1]
        axes = range(given.dim()) if whole else [axis % given.dim() for axis in args[1]]
        channels, zeros = shadow.channels, shadow.zeros
        if any(varies(channels, axis) for axis in axes):
            self.fix(given)
            self.put(made, self._fixed(made), self._unknown(made), [shadow])
            return
        for axis in axes:
            channels = channels.narrow(axis, 0, 1)
            zeros = zeros.all(axis, keepdim=True)
        if channels.dim() != made.dim():
            for axis in sorted(axes, reverse=True):
                channels, zeros = channels.squeeze(axis), zeros.squeeze(axis)
        self.put(made, channels, zeros, [shadow], shadow.maker)


def varies(tensor: torch.Tensor, axis: int) -> bool:
    """Whether anything depends on the place along an axis."""
    if tensor.dim() == 0 or tensor.shape[axis] <= 1 or tensor.stride(axis) == 0:
        return False
    return bool((tensor != tensor.narrow(axis, 0, 1)).any())


def once(tensor: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """The first of all that is the same along axes, in it and in others of its shape."""
    for axis in range(tensor.dim()):
        if all(one.stride(axis) == 0 for one in (tensor, *others)):
            tensor = tensor.narrow(axis, 0, 1)
    return tensor


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """The same, stored once along the axes on which nothing depends."""
    small = tensor
    for axis in range(tensor.dim()):
        if not varies(small, axis):
            small = small.narrow(axis, 0, min(1, small.shape[axis]))
    return small.clone().expand(tensor.shape)


def along(tensor: torch.Tensor, axis: int) -> torch.Tensor | None:
    """The vector along an axis, if nothing depends on the other axes."""
    for other in range(tensor.dim()):
        if other == axis % tensor.dim():
            continue
        if varies(tensor, other):
            return None
        tensor = tensor.narrow(other, 0, 1)
    return tensor.flatten()


def spread(vector: torch.Tensor, axis: int, shape: Sequence[int]) -> torch.Tensor:
    """A vector along an axis of a tensor of this shape."""
    sizes = [1] * len(shape)
    sizes[axis] = len(vector)
    return vector.view(sizes).expand(tuple(shape))


def _count(channels: torch.Tensor) -> int:
    """How many different ones."""
    return len(once(channels).unique())


def _aligned(tensor: torch.Tensor, dimensions: int) -> torch.Tensor:
    return tensor.reshape((1,) * (dimensions - tensor.dim()) + tuple(tensor.shape))


def _broadcast(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return tensor.expand(like.shape)


def storage_of(tensor: torch.Tensor) -> int:
    """The same number for tensors that share memory."""
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)


def _is_pointwise(function: Any) -> bool:
    return torch.Tag.pointwise in function.tags or function.overloadpacket in _POINTWISE


def _keeps_zero(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> bool:
    """Whether it makes 0 of zeros, its numbers being what they are."""

    def zero_for(tensor: torch.Tensor) -> torch.Tensor:
        return torch.zeros(1, dtype=tensor.dtype) if tensor.is_floating_point() else tensor

    try:
        made = function(*map_tensors(list(args), zero_for), **map_tensors(dict(kwargs), zero_for))
    except RuntimeError:  # as of shapes that fit no more
        return False
    return made.is_floating_point() and bool((made == 0).all())
