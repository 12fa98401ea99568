"""Does the speed-up hold where networks are deployed?

The dense and the factorized network in eager mode, compiled, in ONNX Runtime and in OpenVINO, batch
norms folded in both: milliseconds of the first batch in turns, and the realised speed-up, the share
of the MACs' reduction that the clock sees. Networks are planned by MACs, and by the clock of the
runtime itself where that is asked for. Writes runtimes.json, in which what is there is not done
again, and a table of docs/results.md.
"""

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import where
from race import between_markers, machine, markdown_table, save
from suite import cases

import rankfold
from rankfold.batches import run
from rankfold.errors import RankfoldError
from rankfold.measure import in_fastest_memory_format, latencies
from rankfold.runtime import Runtime, caller, version_of

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "results.md"
NAMES = ("demo", "crepe", "english_g2", "craft")
RUNTIMES: tuple[Runtime, ...] = ("eager", "compile", "onnxruntime", "openvino")
WHERE = "where"
SHARE = 0.3  # of the MACs


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


def measured(name: str, by_clock: bool, found: dict[str, Any]) -> None:
    torch.manual_seed(0)
    case = cases.make(name)
    model, batch = case.make_model().eval(), case.data[0]
    dense = rankfold.fold_batch_norms(model, batch)
    if missing := [one for one in (*RUNTIMES, WHERE) if one not in found]:
        plan = rankfold.analyze(model, case.data).plan(macs=SHARE)
        small = rankfold.fold_batch_norms(rankfold.factorize(model, plan), batch)
        found["MACs"] = plan.before.macs / plan.after.macs
        takes = {WHERE: seen, **{one: partial(tried, runtime=one) for one in RUNTIMES}}
        for one in missing:
            found[one] = takes[one](dense, small, batch)
            print(name, one, found[one], flush=True)
    if by_clock and "by clock" not in found:
        kept = found.setdefault("by clock", {})
        for runtime in ("eager", "onnxruntime", "openvino"):
            small = rankfold.compress(
                model, case.data, latency=1 / 3, runtime=runtime, epochs=0, test=[batch]
            )
            plan = rankfold.record_of(small).plan
            small = rankfold.fold_batch_norms(small, batch)
            kept[runtime] = {
                "MACs": plan.before.macs / plan.after.macs,
                "ms": compared(dense, small, batch, runtime),
            }
            print(name, "by the clock of", runtime, kept[runtime], flush=True)


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
        measured(name, by_clock, facts["rows"].setdefault(name, {}))
        save(out, facts)
    write_document(facts)


def write_document(facts: dict[str, Any]) -> None:
    header = ("network", "MACs", *RUNTIMES)
    lines = []
    for name, row in facts["rows"].items():
        lines.append((name, f"{row['MACs']:.1f}x less", *(_cell(row, one) for one in RUNTIMES)))
        for runtime, found in row.get("by clock", {}).items():
            cells = {runtime: _shown(found["ms"], found["MACs"])}
            lines.append(
                (
                    f"{name}, for a third of the time in {runtime}",
                    f"{found['MACs']:.1f}x less",
                    *(cells.get(one, "") for one in RUNTIMES),
                )
            )
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


def _shown(milliseconds: list[float], macs: float) -> str:
    dense, ours = milliseconds
    return f"{dense:.1f} → {ours:.1f} ms: {dense / ours:.1f}x, {dense / ours / macs:.0%} realised"


if __name__ == "__main__":
    typer.run(main)
