"""Dense layers of every geometry that hypothesis can think of, with inputs that fit them."""

import torch
from hypothesis import strategies as st
from torch import nn

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
WIDTHS = st.integers(1, 24)
FEATURES = st.integers(1, 40)
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


@st.composite
def convolutions(draw, channels=WIDTHS, dtype=torch.float32):
    """A Conv1d, 2d or 3d and the shape of an input: any stride, padding, mode, dilation, bias."""
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
    layer = CONVOLUTIONS[dimensions](
        draw(channels),
        draw(channels),
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        bias=draw(st.booleans()),
        padding_mode=mode,
        dtype=dtype,
    )
    # At least as long as the dilated kernel, and longer than a reflected padding.
    lengths = tuple(5 + extra for extra in per_axis(0, 3))
    return layer, (2, layer.in_channels, *lengths)


@st.composite
def linears(draw, features=FEATURES, dtype=torch.float32):
    """A Linear and the shape of an input, with any number of leading modes."""
    layer = nn.Linear(draw(features), draw(features), draw(st.booleans()), dtype=dtype)
    leading = draw(st.lists(st.integers(1, 3), min_size=0, max_size=3))
    return layer, (*leading, layer.in_features)


def layers(dtype=torch.float32, **sizes):
    return st.one_of(linears(dtype=dtype), convolutions(dtype=dtype, **sizes))


def relative(first: torch.Tensor, second: torch.Tensor) -> float:
    """Norm of the difference over the norm of the second."""
    norm = second.double().norm().item()
    difference = (first.double() - second.double()).norm().item()
    return difference / norm if norm else difference
