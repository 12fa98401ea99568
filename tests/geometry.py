"""Dense layers of every geometry that hypothesis can think of, with inputs that fit them."""

import torch
from hypothesis import strategies as st
from torch import nn

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
WIDTHS = st.integers(1, 24)
UNGROUPED = st.just(1)
FEATURES = st.integers(1, 40)
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


@st.composite
def convolutions(draw, channels=WIDTHS, dtype=torch.float32, groups=UNGROUPED):
    """A Conv1d, 2d or 3d and the shape of an input: any stride, padding, mode, dilation, bias.

    `channels` are those of each group.
    """
    dimensions = draw(st.sampled_from([1, 2, 3]))

    def per_axis(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dimensions))

    kernel, dilation, stride = per_axis(1, 3), per_axis(1, 2), per_axis(1, 3)
    mode = draw(st.sampled_from(PADDING_MODES))
    padding: str | tuple[int, ...] = draw(st.sampled_from(["numbers", "same", "valid"]))
    if padding == "numbers":
        padding = per_axis(0, 2)
    elif padding == "same":
        stride = (1,) * dimensions
    count = draw(groups)
    layer = CONVOLUTIONS[dimensions](
        count * draw(channels),
        count * draw(channels),
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=count,
        bias=draw(st.booleans()),
        padding_mode=mode,
        dtype=dtype,
    )
    # At least as long as the dilated kernel, and longer than a reflected padding.
    lengths = tuple(5 + extra for extra in per_axis(0, 3))
    return layer, (2, layer.in_channels, *lengths)


@st.composite
def transposed_convolutions(draw, channels=WIDTHS, dtype=torch.float32, groups=UNGROUPED):
    """A ConvTranspose1d, 2d or 3d and the shape of an input: of any geometry."""
    dimensions = draw(st.sampled_from([1, 2, 3]))

    def per_axis(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dimensions))

    stride, dilation, count = per_axis(1, 3), per_axis(1, 2), draw(groups)
    most = zip(stride, dilation, strict=True)
    layer = TRANSPOSED[dimensions](
        count * draw(channels),
        count * draw(channels),
        per_axis(1, 3),
        stride=stride,
        padding=per_axis(0, 2),
        output_padding=tuple(draw(st.integers(0, max(both) - 1)) for both in most),
        groups=count,
        bias=draw(st.booleans()),
        dilation=dilation,
        dtype=dtype,
    )
    lengths = tuple(5 + extra for extra in per_axis(0, 3))
    return layer, (2, layer.in_channels, *lengths)


@st.composite
def linears(draw, features=FEATURES, dtype=torch.float32):
    """A Linear and the shape of an input, with any number of leading modes."""
    layer = nn.Linear(draw(features), draw(features), draw(st.booleans()), dtype=dtype)
    leading = draw(st.lists(st.integers(1, 3), min_size=0, max_size=3))
    return layer, (*leading, layer.in_features)


def layers(dtype=torch.float32, channels=WIDTHS):
    """Of every kind: linear, plain, grouped and transposed."""
    few = channels if channels is not WIDTHS else st.integers(1, 12)
    return st.one_of(
        linears(dtype=dtype),
        convolutions(dtype=dtype, channels=channels),
        convolutions(dtype=dtype, channels=few, groups=st.integers(2, 3)),
        transposed_convolutions(dtype=dtype, channels=few, groups=st.integers(1, 3)),
    )


def relative(first: torch.Tensor, second: torch.Tensor) -> float:
    """Norm of the difference over the norm of the second."""
    norm = second.double().norm().item()
    difference = (first.double() - second.double()).norm().item()
    return difference / norm if norm else difference
