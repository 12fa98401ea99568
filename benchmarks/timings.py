"""Do predicted times come true, and does timing anew predict the same?

A network is timed twice, with nothing remembered, and planned by MACs and by the clock each time;
the whole factorized network is then timed beside the dense one. And one layer in its place at many
ranks. Writes timings.json and tables of docs/planning.md.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from race import between_markers, machine, markdown_table, save
from suite import cases

import rankfold
from rankfold.analysis.alone import filled
from rankfold.analysis.in_context import relative_in_place
from rankfold.analysis.timing_cache import TimingCache
from rankfold.batches import run
from rankfold.measure import latencies, with_memory_format
from rankfold.merging import planned_form
from rankfold.methods import RemoveUnits

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "planning.md"
CPU = torch.device("cpu")
NAMES = ("english_g2", "demo")
BUDGETS = (
    *(("macs", share) for share in (0.7, 0.5, 0.35)),
    *(("latency", share) for share in (0.85, 0.75, 0.65)),
)
LAYER = "network.SequenceModeling.1.rnn"  # of english_g2
UNITS = range(96, 256, 8)


def predictions(name: str) -> list[dict[str, Any]]:
    case = cases.make(name)
    model, batch = case.make_model().eval(), case.data[0]
    # Which layers a plan factorizes says nothing of how long they take: no calibration.
    untimed = rankfold.analyze(model, case.data[:1], metric="weight")
    found = []
    for _ in range(2):
        analysis = rankfold.with_timings(untimed, model, case.data[:1], cache=TimingCache(None))
        assert analysis.timing is not None
        dense = with_memory_format(model, analysis.timing.memory_format)
        for budget, share in BUDGETS:
            plan = analysis.plan(**{budget: share})
            small = rankfold.factorize(model, plan).eval()
            networks = [with_memory_format(small, analysis.timing.memory_format), dense, model]
            with torch.no_grad():
                calls = [lambda one=one: run(one, batch) for one in networks]
                ours, *theirs = latencies(calls, CPU, seconds=3)
            assert plan.after.latency_ms is not None and plan.before.latency_ms is not None
            row = {
                "budget": budget,
                "share": share,
                "predicted": plan.after.latency_ms / plan.before.latency_ms,
                "measured": ours / min(theirs),
            }
            print(name, row, flush=True)
            found.append(row)
    return found


def steps() -> dict[int, float]:
    """What a layer takes with fewer units, as multiples of all of them; the median of each."""
    case = cases.make("english_g2")
    model, batch = case.make_model().eval(), case.data[0]
    layer = model.get_submodule(LAYER)
    found = {}
    for units in UNITS:
        form = filled(planned_form(RemoveUnits(), layer, (units,)), CPU)
        with torch.no_grad():
            found[units] = relative_in_place({layer: form}, lambda: run(model, batch), CPU)[layer]
    print(found, flush=True)
    return found


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(NAMES)}")] = None,
    threads: int = 2,
    out: Path = HERE / "timings.json",
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    facts: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"networks": {}}
    facts["machine"] = machine()
    for name in only or NAMES:
        facts["networks"][name] = predictions(name)
        save(out, facts)
    facts["steps"] = steps()
    save(out, facts)
    write_document(json.loads(out.read_text()))


def write_document(facts: dict[str, Any]) -> None:
    lines = []
    for name, rows in facts["networks"].items():
        half = len(rows) // 2
        for first, second in zip(rows[:half], rows[half:], strict=True):
            asked = "MACs" if first["budget"] == "macs" else "time"
            both = [f"{one['predicted']:.2f}, {one['measured']:.2f}" for one in (first, second)]
            lines.append((name, f"{100 * first['share']:.0f} % of {asked}", *both))
    header = ("", "plan", "predicted, measured", "timed anew: predicted, measured")
    on = ", ".join(f"{name} {value}" for name, value in facts["machine"].items())
    table = markdown_table(header, lines)
    between_markers(DOCUMENT, "timings", f"{table}\nMeasured on: {on}.\n")
    units = markdown_table(
        ("units", *facts["steps"]), [("time", *(f"{one:.2f}" for one in facts["steps"].values()))]
    )
    between_markers(DOCUMENT, "steps", units)


if __name__ == "__main__":
    typer.run(main)
