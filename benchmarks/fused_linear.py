"""A low-rank linear layer in one kernel, beside two products of the vendor's library, on a GPU.

The kernel (Triton) keeps what is between the two factors on the chip: a program makes it for some
rows, and goes on with some of the outputs' columns; sizes of tiles are tuned for every shape. Both
in bfloat16, with the same rounding in between, in a CUDA graph, inputs and weights taking turns.
Microseconds of a dense layer, of two products and of the kernel, and both errors relative to
float64. Writes fused_linear.json and a table of docs/results.md.
"""

import json
from pathlib import Path
from typing import Any

import torch
import typer
from gpu import DEVICE, in_graphs
from race import between_markers, machine, markdown_table, save
from torch import nn

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "results.md"
ROWS = (256, 4096)
SIZES = ((1024, 1024), (1024, 4096), (4096, 1024), (4096, 4096))  # inputs, outputs
RANKS = (64, 128, 256)
SETS = 4


class Fused(nn.Module):
    def __init__(self, factors: nn.Sequential) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        from fused_linear_kernel import product  # which needs Triton

        first, second = self.factors
        return product(given, first.weight, second.weight, second.bias)


def race(rows: int, inputs: int, outputs: int, rank: int) -> dict[str, Any]:
    options: dict[str, Any] = {"device": DEVICE, "dtype": torch.bfloat16}
    contenders: list[list[tuple[nn.Module, torch.Tensor]]] = [[], [], []]
    for _ in range(SETS):
        given = torch.randn(rows, inputs, **options)
        first = nn.Linear(inputs, rank, bias=False, **options)
        factors = nn.Sequential(first, nn.Linear(rank, outputs, **options))
        layers = nn.Linear(inputs, outputs, **options), factors, Fused(factors)
        for place, layer in enumerate(layers):
            contenders[place].append((layer, given))
    with torch.no_grad():
        (factors, given), (fused, _) = contenders[1][0], contenders[2][0]
        first, second = (factor.weight.double() for factor in factors)
        exact = given.double() @ first.T @ second.T + factors[1].bias.double()
        errors = [
            float((layer(given).double() - exact).norm() / exact.norm())
            for layer in (factors, fused)
        ]
        times = in_graphs(contenders)
    facts = {"rows": rows, "inputs": inputs, "outputs": outputs, "rank": rank}
    return {**facts, "microseconds": times, "errors": errors}


def main(only_write: bool = False, out: Path = HERE / "fused_linear.json") -> None:
    if not only_write:
        layers = [race(rows, *size, rank) for rows in ROWS for size in SIZES for rank in RANKS]
        save(out, {"machine": machine(), "layers": layers})
    facts = json.loads(out.read_text())
    header = ("rows", "inputs x outputs", *(f"rank {rank}" for rank in RANKS))
    lines = []
    for rows in ROWS:
        for size in SIZES:
            cells = [
                "{:.1f} / {:.1f} / {:.1f} µs".format(*layer["microseconds"])
                for layer in facts["layers"]
                if (layer["rows"], layer["inputs"], layer["outputs"]) == (rows, *size)
            ]
            lines.append((str(rows), f"{size[0]} x {size[1]}", *cells))
    between_markers(DOCUMENT, "fused linear", markdown_table(header, lines))


if __name__ == "__main__":
    typer.run(main)
