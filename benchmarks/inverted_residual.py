"""What is gained on a network of 1x1 convolutions: MACs, parameters, accuracy, time.

In three parts: `latency` makes the plan for a budget of time; `compress` plans, factorizes and
recovers; `speed` times all networks in turn, as they are and with batch norms folded and adjacent
factors merged. Writes benchmarks/inverted_residual.json and a table of docs/methods.md.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from fashion_mnist import HELD_BACK, make_data, make_test, read
from inverted_residual_network import CACHE, make_model
from race import between_markers, machine, markdown_table, save
from torch import nn

import rankfold
from rankfold.analysis import Analysis
from rankfold.cost import count_macs, count_parameters
from rankfold.errors import BudgetError
from rankfold.measure import latencies, with_memory_format
from rankfold.methods import DEFAULT_METHODS
from rankfold.plan import Plan
from rankfold.search import TimedPlan, plan_to_latency

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "methods.md"
KEPT = CACHE / "inverted_residual"
LATENCY = 0.7  # of the dense time
RECOVERED_ON = 12_800  # images without labels, once each
BATCHES = (1, 32)  # that are timed


@dataclass(frozen=True)
class Case:
    methods: tuple[str, ...]
    metric: str
    macs: float | None  # None: a budget of time


FOR_TIME = "default methods, by time, batch norms folded"
WITH_BLOCKS = (*DEFAULT_METHODS, "block-diagonal")
CASES = {
    "svd, weight metric, 50 % of MACs": Case(("svd",), "weight", 0.5),
    "svd, fisher metric, 50 %": Case(("svd",), "fisher", 0.5),
    "default methods, 70 %": Case(DEFAULT_METHODS, "auto", 0.7),
    "default methods, 50 %": Case(DEFAULT_METHODS, "auto", 0.5),
    "default methods, 35 %": Case(DEFAULT_METHODS, "auto", 0.35),
    "and block-diagonal, 50 %": Case(WITH_BLOCKS, "auto", 0.5),
    "and block-diagonal, 35 %": Case(WITH_BLOCKS, "auto", 0.35),
    FOR_TIME: Case(DEFAULT_METHODS, "auto", None),
}


def network_of(case: Case) -> nn.Module:
    """The dense one; where time counts with its batch norms folded, as it would be deployed."""
    if case.macs is not None:
        return make_model()
    return rankfold.fold_batch_norms(make_model(), images_for(1)[0])


def analysis_of(case: Case, model: nn.Module) -> Analysis:
    """One that is kept, or a new one."""
    folded = "-folded" if case.macs is None else ""
    kept = KEPT / f"{'-'.join(case.methods)}-{case.metric}{folded}-analysis"
    if kept.exists():
        return Analysis.load(kept)
    analysis = rankfold.analyze(model, make_data(), methods=case.methods, metric=case.metric)
    analysis.save(kept)
    return analysis


def plan_for_time() -> None:
    """Makes and keeps the plan for the budget of time, or for the least that is within reach."""
    case, images = CASES[FOR_TIME], images_for(BATCHES[-1])
    model = network_of(case)
    analysis = rankfold.with_timings(analysis_of(case, model), model, images)

    def plan_for(latency: float) -> TimedPlan:
        return plan_to_latency(
            model, analysis, latency, images[0], lambda aim: analysis.plan(latency=aim)
        )

    try:
        found = plan_for(LATENCY)
    except BudgetError as error:
        print(error, flush=True)
        found = plan_for(min(1.02 * error.smallest["latency"], 1.0))
    found.plan.save(KEPT / "plan-for-time.json")


def compress(case: Case) -> tuple[dict[str, Any], nn.Module]:
    model = network_of(case)
    start = time.perf_counter()
    analysis = analysis_of(case, model)
    seconds = time.perf_counter() - start
    if case.macs is None:
        plan = Plan.load(KEPT / "plan-for-time.json")
    else:
        plan = analysis.plan(macs=case.macs)
    row = {
        "metric": plan.metric,
        "macs": plan.after.macs,
        "parameters": plan.after.parameters,
        "plan": {entry.name: [entry.method, entry.rank] for entry in plan.factorized},
        "analysis_seconds": seconds,
    }
    return row, rankfold.factorize(model, plan, analysis=analysis)


def recover(small: nn.Module) -> float:
    """Seconds that it took."""
    images = read("train")[0][:-HELD_BACK]
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:RECOVERED_ON]
    teacher = make_model().to(memory_format=torch.channels_last)
    small.to(memory_format=torch.channels_last)
    data = list(images[chosen].split(128))
    found = rankfold.recover(small, data, teacher=teacher, epochs=1, learning_rate=1e-3)
    return found.seconds


def images_for(batch: int) -> list[torch.Tensor]:
    return [read("t10k")[0][:batch]]


def speeds(names: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """Milliseconds by network, as it is or merged, and batch: all in turn, in the faster format."""
    networks = {"dense": make_model()}
    networks |= {name: rankfold.load(KEPT / name, like=network_of(CASES[name])) for name in names}
    found: dict[str, dict[str, list[float]]] = {name: {} for name in networks}
    for kind in ("as it is", "merged"):
        for batch in BATCHES:
            (given,) = images_for(batch)
            if kind == "merged":
                networks = {
                    name: rankfold.merge_adjacent(one, given) for name, one in networks.items()
                }
            with torch.no_grad():
                calls = [
                    partial(with_memory_format(one, memory_format).eval(), given)
                    for one in networks.values()
                    for memory_format in ("contiguous", "channels_last")
                ]
                times_of_both = latencies(calls, torch.device("cpu"), seconds=1.0)
            milliseconds = map(min, times_of_both[::2], times_of_both[1::2])
            for name, one in zip(networks, milliseconds, strict=True):
                found[name].setdefault(kind, []).append(one)
                print(f"{name}, {kind}, batch {batch}: {one:.3f} ms", flush=True)
    return found


def main(
    part: Annotated[list[str] | None, typer.Option(help="compress, latency or speed")] = None,
    only: Annotated[list[str] | None, typer.Option(help="a case; may be repeated")] = None,
    threads: int = 2,
    out: Path = HERE / "inverted_residual.json",
) -> None:
    torch.set_num_threads(threads)
    facts = json.loads(out.read_text()) if out.exists() else {"cases": {}}
    parts = part or ["compress", "latency", "speed"]
    if "latency" in parts:
        plan_for_time()
    for name in (only or CASES) if "compress" in parts else ():
        torch.manual_seed(0)
        row, small = compress(CASES[name])
        row["accuracy"] = {"factorized": rankfold.accuracy(small, make_test())}
        row["recovery_seconds"] = recover(small)
        row["accuracy"]["recovered"] = rankfold.accuracy(small, make_test())
        print(name, json.dumps(row), flush=True)
        rankfold.save(small.to(memory_format=torch.contiguous_format), KEPT / name)
        facts["cases"][name] = row
        save(out, facts)
    if "dense" not in facts:
        facts["dense"] = dense()
    if "speed" in parts:
        facts["machine"] = machine()
        facts["milliseconds"] = speeds(list(facts["cases"]))
    save(out, facts)
    write_document(facts)


def dense() -> dict[str, Any]:
    model = make_model()
    pointwise = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
    macs = count_macs(lambda: model(images_for(1)[0]))
    return {
        "macs": macs,
        "parameters": count_parameters(model),
        "pointwise_layers": len(pointwise),
        "pointwise_macs": pointwise_macs(model, pointwise),
        "accuracy": rankfold.accuracy(model, make_test()),
    }


def pointwise_macs(model: nn.Module, layers: Sequence[nn.Conv2d]) -> int:
    found = []
    hooks = [
        one.register_forward_hook(lambda one, _, made: found.append(made.numel() * one.in_channels))
        for one in layers
    ]
    with torch.no_grad():
        model(images_for(1)[0])
    for hook in hooks:
        hook.remove()
    return sum(found)


def write_document(facts: dict[str, Any]) -> None:
    header = ["", "MACs", "parameters", "accuracy", "recovered"]
    timed = facts.get("milliseconds", {})
    header += [f"{kind}: batch {batch}" for kind in ("as it is", "merged") for batch in BATCHES]
    whole = facts["dense"]
    lines = [
        [
            "dense",
            f"{whole['macs'] / 1e6:.2f} M",
            f"{whole['parameters'] / 1e6:.3f} M",
            f"{whole['accuracy']:.2%}",
            "",
            *times("dense", timed),
        ]
    ]
    for name in CASES:
        if (row := facts["cases"].get(name)) is None:
            continue
        scores = [f"{row['accuracy'][when]:.2%}" for when in ("factorized", "recovered")]
        shares = [f"{row[cost] / whole[cost]:.0%}" for cost in ("macs", "parameters")]
        lines.append([name, *shares, *scores, *times(name, timed)])
    on = ", ".join(f"{name} {value}" for name, value in facts.get("machine", {}).items())
    text = f"{markdown_table(header, lines)}\nMeasured on: {on}.\n"
    between_markers(DOCUMENT, "inverted residuals", text)


def times(name: str, timed: dict[str, Any]) -> list[str]:
    """Milliseconds of the dense network, and how many times faster another is."""
    cells = []
    for kind, column in timed.get(name, {}).items():
        for mine, whole in zip(column, timed["dense"][kind], strict=True):
            cells.append(f"{whole:.2f} ms" if name == "dense" else f"{whole / mine:.2f}x")
    return cells or [""] * 2 * len(BATCHES)


if __name__ == "__main__":
    typer.run(main)
