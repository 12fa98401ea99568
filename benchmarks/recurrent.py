"""What the ways to make an LSTM smaller take on this device: an LSTM of english_g2's size.

Bidirectional, 256 inputs and units, 50 steps. Fewer units and projected units are timed with and
without the readout that a linear layer behind them takes in. Beside them recurrent matrices of low
rank by themselves, which takes a loop over the steps. Times do not depend on weights. Writes
benchmarks/recurrent.json and a table of docs/recurrent.md.
"""

import json
from pathlib import Path

import torch
import typer
from race import between_markers, grouped, machine, markdown_table, save
from torch import nn

from rankfold.cost import count_parameters
from rankfold.layers import FewerUnits, ProjectedInputs, ProjectedUnits, ReducedStates
from rankfold.measure import latencies

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "recurrent.md"
UNITS, STEPS = 256, 50
BATCHES = (1, 32)
RANKS = (128, 64, 32)


class Looped(nn.Module):
    """An LSTM with recurrent matrices of low rank: a loop over the steps, all inputs before it.

    Both directions take each step together, so that the loop makes as few calls as it can.
    """

    def __init__(self, dense: nn.LSTM, rank: int) -> None:
        super().__init__()
        units = dense.hidden_size
        self.inputs = nn.Linear(dense.input_size, 2 * 4 * units)
        self.down = nn.Parameter(torch.randn(2, units, rank) / units)
        self.up = nn.Parameter(torch.randn(2, rank, 4 * units) / rank)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        """(steps, batch, inputs) → (steps, batch, 2 * units)."""
        steps, batch, _ = given.shape
        units = self.down.shape[1]
        ahead, back = self.inputs(given).chunk(2, dim=-1)
        gates_of_inputs = torch.stack([ahead, back.flip(0)], dim=1)
        states = cells = given.new_zeros(2, batch, units)
        made = []
        for step in range(steps):
            gates = torch.baddbmm(gates_of_inputs[step], torch.bmm(states, self.down), self.up)
            opened, proposed = gates.split([3 * units, units], dim=-1)
            written, kept, shown = opened.sigmoid().chunk(3, dim=-1)
            cells = torch.addcmul(kept * cells, written, proposed.tanh())
            states = shown * cells.tanh()
            made.append(states)
        ahead, back = torch.stack(made).unbind(1)
        return torch.cat([ahead, back.flip(0)], dim=-1)


def contenders() -> dict[str, nn.Module]:
    dense = nn.LSTM(UNITS, UNITS, bidirectional=True)
    found: dict[str, nn.Module] = {"dense": dense}
    for rank in RANKS:
        for name, form in (("fewer units", FewerUnits), ("projected units", ProjectedUnits)):
            made: ReducedStates = form(dense, rank)
            found[f"{name}, {rank}"] = made
            found[f"{name}, {rank}, readout merged"] = made.recurrent
        found[f"low-rank inputs, {rank}"] = ProjectedInputs(dense, rank)
        found[f"low-rank recurrence in a loop, {rank}"] = Looped(dense, rank)
    return found


def main(threads: int = 2, device: str = "cpu", out: Path = HERE / "recurrent.json") -> None:
    torch.set_num_threads(threads)
    networks = {name: network.eval().to(device) for name, network in contenders().items()}
    rows = {name: {"parameters": count_parameters(one)} for name, one in networks.items()}
    for batch in BATCHES:
        given = torch.randn(STEPS, batch, UNITS, device=device)
        with torch.no_grad():
            found = latencies(
                [lambda one=one, given=given: one(given) for one in networks.values()],
                torch.device(device),
                seconds=3,
            )
        for row, milliseconds in zip(rows.values(), found, strict=True):
            row[f"batch {batch}"] = milliseconds
    facts = {"rows": rows, "machine": machine()}
    save(out, facts)
    columns = ("LSTM", "parameters", *(f"batch {batch}" for batch in BATCHES))
    lines = [
        (
            name,
            grouped(row["parameters"]),
            *(_cell(row, rows["dense"], f"batch {batch}") for batch in BATCHES),
        )
        for name, row in rows.items()
    ]
    on = ", ".join(f"{name} {value}" for name, value in facts["machine"].items())
    between_markers(
        DOCUMENT, "recurrent", f"{markdown_table(columns, lines)}\n\nMeasured on: {on}."
    )
    print(json.dumps(rows, indent=1))


def _cell(row: dict[str, float], dense: dict[str, float], key: str) -> str:
    return f"{row[key]:.2f} ms ({dense[key] / row[key]:.1f}x)"


if __name__ == "__main__":
    typer.run(main)
