"""Two factors of a linear layer multiplied in one kernel; what is between stays on the chip."""

import torch
import triton
import triton.language as tl

TILES = ((64, 64, 64, 4), (64, 64, 128, 4), (128, 64, 64, 8), (128, 64, 128, 8), (32, 64, 128, 4))


@triton.autotune(
    configs=[
        triton.Config(
            {"ROWS": rows, "INNER": inner, "COLUMNS": columns, "PARTS": parts},
            num_warps=warps,
            num_stages=3,
        )
        for rows, inner, columns, warps in TILES
        for parts in (1, 2, 4)
    ],
    key=["count", "outputs", "inputs", "RANK"],
)
@triton.jit
def kernel(
    given,
    first,
    second,
    bias,
    result,
    count,
    outputs,
    inputs,
    rank,
    ROWS: tl.constexpr,  # noqa: N803  (Triton's custom)
    INNER: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    PARTS: tl.constexpr,  # noqa: N803
    RANK: tl.constexpr,  # noqa: N803
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ranks, inner = tl.arange(0, RANK), tl.arange(0, INNER)
    between = tl.zeros((ROWS, RANK), dtype=tl.float32)
    for start in range(0, inputs, INNER):
        places = start + inner
        tile = tl.load(
            given + rows[:, None] * inputs + places[None, :],
            mask=(rows[:, None] < count) & (places[None, :] < inputs),
            other=0.0,
        )
        factor = tl.load(
            first + ranks[None, :] * inputs + places[:, None],
            mask=(ranks[None, :] < rank) & (places[:, None] < inputs),
            other=0.0,
        )
        between = tl.dot(tile, factor, between)
    rounded = between.to(given.dtype.element_ty)
    part = tl.cdiv(tl.cdiv(outputs, COLUMNS), PARTS) * COLUMNS
    begin = tl.program_id(1) * part
    for start in range(begin, min(outputs, begin + part), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        factor = tl.load(
            second + columns[None, :] * rank + ranks[:, None],
            mask=(columns[None, :] < outputs) & (ranks[:, None] < rank),
            other=0.0,
        )
        found = tl.dot(rounded, factor)
        found += tl.load(bias + columns, mask=columns < outputs, other=0.0)[None, :]
        tl.store(
            result + rows[:, None] * outputs + columns[None, :],
            found.to(result.dtype.element_ty),
            mask=(rows[:, None] < count) & (columns[None, :] < outputs),
        )


def product(
    given: torch.Tensor, first: torch.Tensor, second: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """(rows, outputs) of (rows, inputs), (rank, inputs), (outputs, rank) and (outputs,)."""
    (count, inputs), (outputs, rank) = given.shape, second.shape
    result = given.new_empty(count, outputs)
    kernel[lambda tiles: (triton.cdiv(count, tiles["ROWS"]), tiles["PARTS"])](
        *(given, first, second, bias, result),
        *(count, outputs, inputs, rank),
        RANK=max(16, triton.next_power_of_2(rank)),
    )
    return result
