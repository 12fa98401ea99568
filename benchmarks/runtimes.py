"""Does the speed-up hold where networks are deployed?

The dense and the factorized network in eager mode, compiled, in ONNX Runtime and in OpenVINO, batch
norms folded in both: milliseconds of the first batch in turns, and the realised speed-up, the share
of the MACs' reduction that the clock sees. Networks are planned by MACs, and by the clock of the
runtime itself where that is asked for; scores are those without recovery. Writes runtimes.json, in
which what is there is not done again, and tables of docs/results.md.
"""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import where
from race import between_markers, machine, markdown_table, save
from suite import cases
from suite.case import Case

import rankfold
from rankfold.batches import run
from rankfold.errors import RankfoldError
from rankfold.measure import in_fastest_memory_format, latencies
from rankfold.runtime import Runtime, caller, version_of
from rankfold.search import plan_to_latency

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "results.md"
NAMES = ("demo", "crepe", "english_g2", "craft")
RUNTIMES: tuple[Runtime, ...] = ("eager", "compile", "onnxruntime", "openvino")
WHERE = "where"
CLOCKS: tuple[Runtime, ...] = ("eager", "onnxruntime", "openvino")  # that are planned by
BY_CLOCK = "by clock"
SHARE = 0.3  # of the MACs
# Of the time, by a runtime's clock. At a third a recogniser has lost most of its words.
OF_TIME = {"demo": 1 / 3, "crepe": 1 / 3, "english_g2": 0.6, "craft": 1 / 3}


def compared(model: Any, small: Any, batch: Any, runtime: Runtime) -> list[float]:
    """Milliseconds of both, each in the memory format in which it is faster there."""
    networks = [in_fastest_memory_format(one, batch, runtime=runtime) for one in (model, small)]
    calls = [caller(one, batch, run, runtime) for one in networks]
    with torch.no_grad():
        return latencies(calls, torch.device("cpu"), seconds=5)


def tried(dense: Any, small: Any, batch: Any, runtime: Runtime) -> list[float] | str:
    """Milliseconds of both, or why there are none."""
    try:
        return compared(dense, small, batch, runtime)
    except RankfoldError as error:
        return str(error)


def seen(dense: Any, small: Any, batch: Any) -> list[dict[str, float]]:
    """Where the time of both goes, in eager mode."""
    with torch.no_grad():
        return [where.in_eager_mode(one, batch) for one in (dense, small)]


def measured(name: str, clocks: Sequence[Runtime], found: dict[str, Any]) -> Iterator[str]:
    """What is missing of a network, and what of it has just been found."""
    missing = [one for one in (*RUNTIMES, WHERE) if one not in found]
    by_clock = found.setdefault(BY_CLOCK, {})
    clocks = [one for one in clocks if one not in by_clock]
    if not missing and not clocks:
        return
    torch.manual_seed(0)
    case = cases.make(name)
    model, batch = case.make_model().eval(), case.data[0]
    dense = rankfold.fold_batch_norms(model, batch)
    analysis = rankfold.analyze(model, case.data)
    if missing:
        plan = analysis.plan(macs=SHARE)
        small = rankfold.fold_batch_norms(rankfold.factorize(model, plan), batch)
        found["MACs"] = plan.before.macs / plan.after.macs
        found["scores"] = [case.score(one) for one in (dense, small)]
        takes = {WHERE: seen, **{one: partial(tried, runtime=one) for one in RUNTIMES}}
        for one in missing:
            found[one] = takes[one](dense, small, batch)
            yield f"{one} {found[one]}"
    for one in clocks:
        by_clock[one] = planned_by_clock(case, model, dense, analysis, one, OF_TIME[name])
        yield f"by the clock of {one} {by_clock[one]}"


def planned_by_clock(
    case: Case,
    model: Any,
    dense: Any,
    analysis: rankfold.Analysis,
    runtime: Runtime,
    share: float,
) -> dict[str, Any] | str:
    """A network for a share of the time in this runtime, or why there is none."""
    data = case.data
    timed = rankfold.with_timings(analysis, model, data, runtime=runtime)
    try:
        planned = plan_to_latency(model, timed, share, data[0], lambda aim: timed.plan(latency=aim))
    except RankfoldError as error:
        return str(error)
    small = rankfold.fold_batch_norms(planned.model, data[0])
    return {
        "MACs": planned.plan.before.macs / planned.plan.after.macs,
        "ms": compared(dense, small, data[0], runtime),
        "score": case.score(small),
    }


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(NAMES)}")] = None,
    by_clock: Annotated[bool, typer.Option(help="also planned by each runtime's clock")] = False,
    threads: int = 2,
    out: Path = HERE / "runtimes.json",
) -> None:
    torch.set_num_threads(threads)
    facts: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"rows": {}}
    facts["machine"] = machine()
    facts["runtimes"] = {runtime: version_of(runtime) for runtime in RUNTIMES}
    for name in only or NAMES:
        for one in measured(name, CLOCKS if by_clock else (), facts["rows"].setdefault(name, {})):
            print(name, one, flush=True)
            save(out, facts)
    write_document(facts)


def write_document(facts: dict[str, Any]) -> None:
    header = ("network (score)", "MACs", *RUNTIMES)
    lines = []
    for name, row in facts["rows"].items():
        before, after = (f"{100 * one:.1f}" for one in row["scores"])
        cells = (_cell(row, one) for one in RUNTIMES)
        lines.append((f"{name} ({before})", f"{row['MACs']:.1f}x less ({after})", *cells))
        clocks = row.get(BY_CLOCK, {})
        if clocks:
            cells = (_by_clock(clocks.get(one)) for one in RUNTIMES)
            lines.append((f"{name}, for {OF_TIME[name]:.0%} of the time there", "", *cells))
    on = ", ".join(f"{name} {value}" for name, value in facts["machine"].items())
    versions = ", ".join(facts["runtimes"].values())
    table = markdown_table(header, lines)
    between_markers(DOCUMENT, "runtimes", f"{table}\nMeasured on: {on}; {versions}.\n")
    profiles = {name: row[WHERE] for name, row in facts["rows"].items() if WHERE in row}
    lines = [
        (kind, *(f"{dense[kind]:.1f} → {small[kind]:.1f}" for dense, small in profiles.values()))
        for kind in (*where.KINDS, where.OTHER)
    ]
    totals = [[sum(one.values()) for one in both] for both in profiles.values()]
    lines.append(("together", *(f"{dense:.1f} → {small:.1f}" for dense, small in totals)))
    header = ("milliseconds in eager mode", *profiles)
    between_markers(DOCUMENT, "where", markdown_table(header, lines))


def _cell(row: dict[str, Any], runtime: str) -> str:
    found = row[runtime]
    return "not run" if isinstance(found, str) else _shown(found, row["MACs"])


def _by_clock(found: dict[str, Any] | str | None) -> str:
    if found is None:
        return ""
    if isinstance(found, str):
        return found
    less = f"{found['MACs']:.1f}x less MACs ({100 * found['score']:.1f})"
    return f"{less}, {_shown(found['ms'], found['MACs'])}"


def _shown(milliseconds: list[float], macs: float) -> str:
    dense, ours = milliseconds
    return f"{dense:.1f} → {ours:.1f} ms: {dense / ours:.1f}x, {dense / ours / macs:.0%} realised"


if __name__ == "__main__":
    typer.run(main)
