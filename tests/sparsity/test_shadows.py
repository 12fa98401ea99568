"""What shadows say, beside what functions do: one channel at a time is changed, or put to 0."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from rankfold.sparsity.shadows import (
    FIXED,
    RESHAPES,
    SLICES,
    Channels,
    Shadows,
    along,
    once,
    spread,
    varies,
)

# Of a tensor (2, 4, 4, 6) with channels along axis 1: what keeps its shape.
SAME_SHAPE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu,
    "scaled": lambda x: x * 3 - x / 2,
    "shifted": lambda x: x + 1,
    "clamped": lambda x: x.clamp(0.5, 2),
    "gated": lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
    "flipped": lambda x: x.flip(1),
    "turned": lambda x: x.transpose(2, 3).reshape(x.shape),
    "written over": lambda x: x.clone().mul_(2).relu_(),
    "pooled": lambda x: functional.max_pool2d(x, 3, 1, 1),
    "averaged": lambda x: functional.avg_pool2d(x, 3, 1, 1),
    "upsampled": lambda x: functional.interpolate(functional.avg_pool2d(x, 2), scale_factor=2),
    "padded": lambda x: functional.pad(x, (1, 0, 0, 1))[:, :, 1:, :-1],
    "halves": lambda x: torch.cat(list(x.chunk(2, 1))[::-1], 1),
    "chosen": lambda x: x[:, torch.tensor([3, 2, 1, 0])],
    "index": lambda x: x.index_select(1, torch.tensor([1, 0, 3, 2])),
    "rolled": lambda x: x.roll(1, 1),
    "stacked": lambda x: torch.stack([x, x], 2).flatten(1, 2)[:, ::2],
    "soft": lambda x: x.softmax(3),
    "soft over channels": lambda x: x.softmax(1),
    "less the mean": lambda x: x - x.mean(1, keepdim=True),
    "normalized": lambda x: functional.layer_norm(x, x.shape[1:]),
    "multiplied": lambda x: x @ x.mT @ x,
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "cast": lambda x: x.float().double(),
}
LAST = {
    "flattened": lambda x: x.flatten(1),
    "rows": lambda x: x.mean((2, 3)),
    "greatest": lambda x: x.amax((2, 3)),
    "as it is": lambda x: x,
    "last": lambda x: x.permute(0, 2, 3, 1),
    "cut": lambda x: x.unbind(3)[2],
    "summed": lambda x: x.sum(1),
    "all": lambda x: x.sum(),
}


class Seen(TorchDispatchMode):
    def __init__(self, shadows: Shadows) -> None:
        super().__init__()
        self.shadows = shadows

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.shadows.apply(func, args, kwargs or {}, made)
        return made


@settings(max_examples=150)
@given(
    st.lists(st.sampled_from(sorted(SAME_SHAPE)), max_size=4),
    st.sampled_from(sorted(LAST)),
    st.sets(st.integers(0, 3), max_size=3),
)
def test_what_depends_on_a_channel_and_what_is_zero(names, last, zero) -> None:
    def network(tensor: torch.Tensor) -> torch.Tensor:
        for name in names:
            tensor = SAME_SHAPE[name](tensor)
        return LAST[last](tensor)

    generator = torch.Generator().manual_seed(0)
    given_tensor = torch.randn(2, 4, 4, 6, dtype=torch.float64, generator=generator)
    given_tensor[:, sorted(zero)] = 0
    shadows = Shadows()
    numbers = shadows.channels.make(4)
    mask = torch.tensor([channel in zero for channel in range(4)])
    with torch.no_grad():
        source = given_tensor.clone()
        shadows.put(source, spread(numbers, 1, source.shape), spread(mask, 1, source.shape), [])
        with Seen(shadows):
            made = network(source)
        found = shadows.of(made)
        assert found.channels.shape == found.zeros.shape == made.shape
        assert (made[found.zeros] == 0).all()
        roots = shadows.channels.roots(numbers)
        of_outputs = shadows.channels.roots(found.channels.flatten()).view(made.shape)
        for root in roots.unique().tolist():
            if root == FIXED:
                continue
            changed = given_tensor.clone()
            changed[:, roots == root] = torch.randn(
                changed[:, roots == root].shape, dtype=torch.float64, generator=generator
            )
            # What is said to be of other channels does not depend on these.
            other = of_outputs != root
            assert torch.equal(network(changed)[other], made[other])


def test_an_unknown_function_fixes_what_it_reads() -> None:
    shadows = Shadows()
    numbers = shadows.channels.make(3)
    tensor = torch.randn(3, 3)
    shadows.put(tensor, spread(numbers, 0, (3, 3)), torch.zeros(3, 3, dtype=torch.bool), [])
    with Seen(shadows), torch.no_grad():
        torch.linalg.inv(tensor)
    assert shadows.channels.roots(numbers).tolist() == [FIXED] * 3


def test_what_is_written_to_under_another_name_is_fixed() -> None:
    shadows = Shadows()
    numbers = shadows.channels.make(4)
    tensor = torch.zeros(2, 4)
    shadows.put(tensor, spread(numbers, 1, (2, 4)), torch.ones(2, 4, dtype=torch.bool), [])
    with Seen(shadows), torch.no_grad():
        tensor[:, :2] += 1
    assert shadows.channels.roots(numbers)[:2].tolist() == [FIXED] * 2


def test_what_is_reshaped_keeps_its_channels_if_it_is_told_to() -> None:
    for keep in (True, False):
        shadows = Shadows(RESHAPES if keep else SLICES)
        numbers = shadows.channels.make(4)
        tensor = torch.randn(2, 4, 3)
        no = torch.zeros(2, 4, 3, dtype=torch.bool)
        shadows.put(tensor, spread(numbers, 1, (2, 4, 3)), no, [])
        with Seen(shadows), torch.no_grad():
            tensor.flatten(1)
        assert (shadows.channels.roots(numbers) == FIXED).all() == keep


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=12))
def test_channels_that_are_joined_have_one_root(pairs) -> None:
    channels = Channels()
    numbers = channels.make(9)
    assert numbers.tolist() == list(range(1, 10))
    groups = {number: {number} for number in range(1, 10)}
    for one, other in pairs:
        channels.join(torch.tensor([one]), torch.tensor([other]))
        together = groups[one] | groups[other]
        groups |= dict.fromkeys(together, together)
    roots = dict(zip(numbers.tolist(), channels.roots(numbers).tolist(), strict=True))
    for one in groups:
        assert {other for other in groups if roots[other] == roots[one]} == groups[one]
    channels.fix(numbers[:1])
    assert all(
        (root == FIXED) == (number in groups[1])
        for number, root in zip(roots, channels.roots(numbers).tolist(), strict=True)
    )


@pytest.mark.parametrize("expanded", [True, False])
def test_vectors_along_axes(expanded) -> None:
    tensor = spread(torch.arange(4), 1, (2, 4, 3))
    tensor = tensor if expanded else tensor.contiguous()
    assert [varies(tensor, axis) for axis in range(3)] == [False, True, False]
    assert along(tensor, 1).tolist() == along(tensor, -2).tolist() == [0, 1, 2, 3]
    assert along(tensor, 0) is None
    assert once(tensor).shape == ((1, 4, 1) if expanded else (2, 4, 3))
