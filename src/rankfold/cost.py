"""What a network costs: its parameters, and its multiply-accumulates counted as it runs.

MACs come from torch's own FLOP counter (1 MAC = 2 FLOPs: products of matrices, convolutions,
attention), so a layer has no cost formula of its own; what the counter does not know (recurrent
layers fused by oneDNN or cuDNN) is told to it here.
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from rankfold.layers import ProjectedInputs, ReducedStates


def count_parameters(model: nn.Module) -> int:
    """Numbers in all parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(call: Callable[[], Any]) -> int:
    """Multiply-accumulates of everything that `call()` runs, on whatever device.

    Fused attention is taken apart while counting, so that its products are seen.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    counter = FlopCounterMode(display=False, custom_mapping=_NOT_COUNTED_BY_TORCH)
    counter.mod_tracker = _NoModules()
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            call()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return counter.get_total_flops() // 2


class _NoModules(ModuleTracker):
    """Only the sum over all modules is asked for.

    Torch's own dies, without gradients, of a parameter that is a module's input.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        """Nothing was begun."""


def count_layer_macs(layer: nn.Module, input_shapes: Sequence[Sequence[int]]) -> int:
    """MACs of a layer on the meta device, summed over calls with the given input shapes."""
    dtype = next(layer.parameters()).dtype
    with warnings.catch_warnings():
        # "same" padding of an even kernel warns of a copy; nothing is computed here.
        warnings.simplefilter("ignore")

        def count(shape: Sequence[int]) -> int:
            given = example_input(layer, shape, dtype, torch.device("meta"))
            return count_macs(partial(layer, given))

        if isinstance(layer, nn.RNNBase | ReducedStates | ProjectedInputs):
            count = partial(_count_steps, layer, count)
        calls = Counter(map(tuple, input_shapes))  # a cell is called alike for every step
        return sum(times * count(shape) for shape, times in calls.items())


def shape_of_call(layer: nn.Module, given: torch.Tensor) -> tuple[int, ...]:
    """A call is remembered by the shape of its input; a lookup by that of the ids, and a 1."""
    is_lookup = isinstance(layer, nn.Embedding)
    return (*given.shape, 1) if is_lookup else tuple(given.shape)


def example_input(
    layer: nn.Module, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Something that a layer can be called with, from the shape of a call: random numbers, or ids.

    Of `TiedLayers` a last mode of 1 is a lookup.
    """
    count = getattr(layer, "num_embeddings", None)
    if count is not None and shape[-1] == 1:
        return torch.randint(int(count), tuple(shape[:-1]), device=device)
    return torch.rand(tuple(shape), device=device).to(dtype)


def _count_steps(
    layer: nn.RNNBase | ReducedStates | ProjectedInputs,
    count: Callable[[Sequence[int]], int],
    shape: Sequence[int],
) -> int:
    """Of a recurrent layer from two counts: the meta device goes slowly through equal steps."""
    axis = 1 if layer.batch_first and len(shape) == 3 else 0
    one, two = (count([*shape[:axis], steps, *shape[axis + 1 :]]) for steps in (1, 2))
    return one + (shape[axis] - 1) * (two - one)


def _onednn_recurrent_flops(
    inputs: Sequence[int],
    input_weight: Sequence[int],
    hidden_weight: Sequence[int],
    *_: Any,
    **__: Any,
) -> int:
    """One direction of one layer: both matrices once per step and sample (shapes come in)."""
    positions = inputs[0] * inputs[1]
    weights = input_weight[0] * input_weight[1] + hidden_weight[0] * hidden_weight[1]
    return 2 * positions * weights


def _cudnn_recurrent_flops(
    inputs: Sequence[int], weights: Sequence[Sequence[int]], *_: Any, **__: Any
) -> int:
    """All layers and directions: every matrix once per step and sample (shapes come in)."""
    positions = inputs[0] * inputs[1] if len(inputs) == 3 else inputs[0]
    return 2 * positions * sum(w[0] * w[1] for w in weights if len(w) == 2)


def _matrix_vector_flops(matrix: Sequence[int], vector: Sequence[int], **_: Any) -> int:
    return 2 * matrix[0] * matrix[1]


def _trilinear_flops(
    first: Sequence[int],
    second: Sequence[int],
    third: Sequence[int],
    *new_modes: Sequence[int],
    **_: Any,
) -> int:
    """`nn.Bilinear`: one product per element of the three tensors brought to a common shape."""
    expanded = []
    for lengths, modes in zip((first, second, third), new_modes[:3], strict=True):
        expanded.append(list(lengths))
        for mode in sorted(modes):
            expanded[-1].insert(mode, 1)
    return 2 * math.prod(map(max, *expanded))


def _complex_transform_flops(shape: Sequence[int], modes: Sequence[int], *_: Any, **__: Any) -> int:
    return _transform_flops(shape, modes)


def _real_transform_flops(shape: Sequence[int], modes: Sequence[int], *_: Any, **__: Any) -> int:
    return _transform_flops(shape, modes) // 2


def _inverse_real_transform_flops(
    shape: Sequence[int], modes: Sequence[int], _: int, length: int, **__: Any
) -> int:
    """Of half a spectrum to a real tensor so long along the last of its modes."""
    whole = list(shape)
    whole[modes[-1]] = length
    return _transform_flops(whole, modes) // 2


def _transform_flops(shape: Sequence[int], modes: Sequence[int]) -> int:
    """5 n log₂ n for a complex transform of n numbers, half of it for a real one.

    The customary count of a fast Fourier transform whose length is a power of two (Van Loan:
    Computational frameworks for the fast Fourier transform. 1992, section 1.4), taken for all.
    """
    length = math.prod(shape[mode] for mode in modes)
    return round(5 * math.prod(shape) * math.log2(length)) if length else 0


_NOT_COUNTED_BY_TORCH: dict[Any, Any] = {
    torch.ops.aten.mkldnn_rnn_layer: _onednn_recurrent_flops,
    torch.ops.aten._cudnn_rnn: _cudnn_recurrent_flops,
    torch.ops.aten.mv: _matrix_vector_flops,
    torch.ops.aten._trilinear: _trilinear_flops,
    torch.ops.aten._fft_c2c: _complex_transform_flops,
    torch.ops.aten._fft_r2c: _real_transform_flops,
    torch.ops.aten._fft_c2r: _inverse_real_transform_flops,
}
