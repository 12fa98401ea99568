"""`rankfold inspect`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from rankfold.analysis import Overrides, analyze
from rankfold.batches import first_batches
from rankfold.cli.console import print_json, progress, results
from rankfold.cli.inputs import load_functions, load_inputs, prepare
from rankfold.cli.options import (
    DataPath,
    Device,
    Energy,
    Evbmf,
    ForwardPath,
    Fraction,
    Json,
    Keep,
    Latency,
    Layers,
    LossMetric,
    Macs,
    Memory,
    MethodNames,
    MetricPath,
    ModelPath,
    Params,
    RuntimeName,
    Seed,
    TestPath,
    TextPath,
    Threads,
)
from rankfold.factorize import factorize
from rankfold.measure import in_fastest_memory_format, measure
from rankfold.picture import draw_analysis


def inspect(
    model: ModelPath,
    data: DataPath = None,
    text: TextPath = None,
    test: TestPath = None,
    metric: MetricPath = None,
    forward: ForwardPath = None,
    params: Params = None,
    macs: Macs = None,
    memory: Memory = None,
    latency: Latency = None,
    energy: Energy = None,
    fraction: Fraction = None,
    evbmf: Evbmf = False,
    layers: Layers = None,
    keep: Keep = None,
    methods: MethodNames = None,
    loss_metric: LossMetric = "auto",
    runtime: RuntimeName = "eager",
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw the analysis into this PNG or SVG file.")
    ] = None,
    save_analysis: Annotated[
        Path | None, typer.Option("--save-analysis", help="Directory to plan from again.")
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Show every layer, what a plan does with it, and the network before and after, unrecovered."""
    place = prepare(device, threads, seed)
    network, batches, judged = load_inputs(model, data, text, test, place)
    run_forward, measured = load_functions(forward, metric)
    analysis = analyze(
        network,
        batches,
        forward=run_forward,
        layers=layers or "*",
        methods=methods or None,
        metric=loss_metric,
        timed=latency is not None or plot is not None or save_analysis is not None,
        runtime=runtime,
        seed=seed,
        progress=progress,
    )
    plan = analysis.plan(
        params=params,
        macs=macs,
        memory=memory,
        latency=latency,
        energy=energy,
        fraction=fraction,
        evbmf=evbmf,
        overrides=Overrides(keep=keep or ()),
    )
    if save_analysis is not None:
        analysis.save(save_analysis)
    if plot is not None:
        draw_analysis(analysis, plan, plot)
    small = factorize(network, plan, progress=progress)
    batch = next(first_batches(judged, 1, place))
    comparison = measure(
        in_fastest_memory_format(network, batch, run_forward, progress, runtime),
        in_fastest_memory_format(small, batch, run_forward, progress, runtime),
        judged,
        metric=measured,
        forward=run_forward,
        runtime=runtime,
        progress=progress,
    )
    if as_json:
        print_json(comparison, layers=plan.to_json()["layers"])
    else:
        results.print(plan, Text("\n".join(analysis.trust())), comparison)
