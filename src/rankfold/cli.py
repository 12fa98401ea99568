"""The command line: `rankfold demo`, `inspect`, `compress`, `slice`, `evaluate`.

Tables and progress are for people and go to the terminal; with `--json` standard output holds one
JSON object and nothing else. An error that rankfold knows is one line and exit status 2.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Sized
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table
from rich.text import Text
from torch import nn

from rankfold import processes
from rankfold.analysis import Analysis, Overrides, analyze
from rankfold.batches import Data, Forward, device_of, first_batches, run, tensors_of
from rankfold.checkpoint import check_target, load, read_plan_document, save
from rankfold.compress import compress as compress_model
from rankfold.deployment import merge_adjacent
from rankfold.distances import Cosine, Distance, Divergence, SquaredError
from rankfold.elastic import slice_to
from rankfold.errors import (
    BudgetError,
    CalibrationError,
    CheckpointError,
    DeviceError,
    RankfoldError,
)
from rankfold.factorize import factorize
from rankfold.imports import resolve_data, resolve_function, resolve_model, resolve_text
from rankfold.measure import Comparison, Metric, in_fastest_memory_format, measure
from rankfold.measure import evaluate as measure_metric
from rankfold.picture import draw_analysis
from rankfold.plan import Cost, Plan
from rankfold.pretrained import is_pretrained
from rankfold.record import record_of
from rankfold.recover import Precision, Schedule
from rankfold.runtime import Runtime

T = TypeVar("T")


class DistanceName(StrEnum):
    """What recovery lowers (`rankfold.distances`)."""

    squared = "squared"
    divergence = "divergence"
    cosine = "cosine"


_DISTANCES: dict[DistanceName, Distance] = {
    DistanceName.squared: SquaredError(),
    DistanceName.divergence: Divergence(),
    DistanceName.cosine: Cosine(),
}

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make trained PyTorch networks smaller and measurably faster by factorization.",
)
people = Console(stderr=True)

ModelPath = Annotated[
    str,
    typer.Argument(
        help="Import path of a model or its factory: pkg:name; or a directory of transformers."
    ),
]
DataPath = Annotated[
    str | None,
    typer.Option("--data", help="Import path of batches, or of a function that makes them."),
]
TextPath = Annotated[
    str | None,
    typer.Option("--text", help="Plain text to make batches of, for a directory of transformers."),
]
TestPath = Annotated[
    str | None, typer.Option("--test", help="Batches to measure on (default: those of --data).")
]
MetricPath = Annotated[
    str | None, typer.Option("--metric", help="Import path of metric(model, data) -> float.")
]
ForwardPath = Annotated[
    str | None, typer.Option("--forward", help="Import path of forward(model, batch) -> output.")
]
Params = Annotated[
    float | None, typer.Option("--params", help="Fraction of parameters kept, or a number > 1.")
]
Macs = Annotated[
    float | None, typer.Option("--macs", help="Fraction of MACs kept, or a number > 1.")
]
Memory = Annotated[
    float | None, typer.Option("--memory", help="Fraction of bytes of weights kept, or bytes.")
]
Latency = Annotated[
    float | None,
    typer.Option("--latency", help="Fraction of the dense time, as measured, or milliseconds."),
]
RuntimeName = Annotated[
    Runtime, typer.Option("--runtime", help="In which times are taken and must be kept.")
]
MethodNames = Annotated[
    list[str] | None,
    typer.Option("--methods", help="Name of a method; may be repeated; or all of them: all."),
]
LossMetric = Annotated[
    str, typer.Option("--loss-metric", help="auto, weight, response, fisher, asvd, fwsvd.")
]
Keep = Annotated[
    list[str] | None, typer.Option("--keep", help="Name or pattern of layers to leave dense.")
]
Energy = Annotated[
    float | None, typer.Option("--energy", help="Share of energy kept in every unfolding.")
]
Fraction = Annotated[float | None, typer.Option("--fraction", help="Fraction of full rank.")]
Evbmf = Annotated[bool, typer.Option("--evbmf", help="Ranks by variational Bayes (the default).")]
Layers = Annotated[
    list[str] | None, typer.Option("--layers", help="Name or pattern of layers; may be repeated.")
]
Epochs = Annotated[int, typer.Option("--epochs", min=0, help="Of recovery; 0 for none.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...")]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads (default: torch's choice).")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
Out = Annotated[Path, typer.Option("--out", help="Directory for the saved model.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a saved model that is there.")]


@app.command()
def demo(
    out: Out = Path("rankfold-demo"),
    macs: Annotated[float, typer.Option("--macs", help="Fraction of MACs kept.")] = 0.25,
    epochs: Epochs = 6,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Compress the network that ships with rankfold, save it, load it again and evaluate that."""
    compress(
        model="rankfold.demo:make_model",
        data="rankfold.demo:make_data",
        test="rankfold.demo:make_test",
        metric="rankfold.demo:accuracy",
        out=out,
        macs=macs,
        epochs=epochs,
        seed=seed,
        device=device,
        threads=threads,
        as_json=as_json,
        force=force,
    )


@app.command()
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
    place = _prepare(device, threads, seed)
    network, batches, judged = _load_inputs(model, data, text, test, place)
    run_forward, measured = _load_functions(forward, metric)
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
        progress=_progress,
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
    small = factorize(network, plan, progress=_progress)
    batch = next(first_batches(judged, 1, place))
    comparison = measure(
        in_fastest_memory_format(network, batch, run_forward, _progress, runtime),
        in_fastest_memory_format(small, batch, run_forward, _progress, runtime),
        judged,
        metric=measured,
        forward=run_forward,
        runtime=runtime,
        progress=_progress,
    )
    if as_json:
        _print_json(comparison, layers=plan.to_json()["layers"])
    else:
        Console().print(_layer_table(plan), _trust(analysis), comparison)


@app.command()
def compress(
    model: ModelPath,
    out: Out,
    data: DataPath = None,
    text: TextPath = None,
    test: TestPath = None,
    metric: MetricPath = None,
    forward: ForwardPath = None,
    loss: Annotated[
        str | None,
        typer.Option("--loss", help="Import path of loss(output, label): recover on labels."),
    ] = None,
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
    max_drop: Annotated[
        float | None,
        typer.Option("--max-drop", help="Fewest MACs that lose so much of the metric at most."),
    ] = None,
    contest: Annotated[
        bool,
        typer.Option("--contest", help="Let the metric choose between plans of one method or all."),
    ] = False,
    epochs: Epochs = 5,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", help="Of recovery, the greatest.")
    ] = 3e-4,
    schedule: Annotated[
        Schedule, typer.Option("--schedule", help="Of the learning rate.")
    ] = "cosine",
    distance: Annotated[
        DistanceName, typer.Option("--distance", help="Of outputs from the original's.")
    ] = DistanceName.squared,
    accumulation: Annotated[
        int, typer.Option("--accumulation", min=1, help="Batches of one step of recovery.")
    ] = 1,
    precision: Annotated[
        Precision, typer.Option("--precision", help="Of the forward pass in recovery.")
    ] = "float32",
    tensorboard: Annotated[
        Path | None, typer.Option("--tensorboard", help="Directory for what recovery logs.")
    ] = None,
    elastic: Annotated[
        float | None,
        typer.Option("--elastic", help="A smaller budget that `rankfold slice` can cut down to."),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Fold batch norms, multiply adjacent linear layers.")
    ] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Analyze, plan, factorize, recover, save; then load what was saved and measure that.

    Interrupted in recovery, the same command goes on from the last finished epoch.
    """
    check_target(out, force)
    place = _prepare(device, threads, seed)
    network, batches, judged = _load_inputs(model, data, text, test, place)
    run_forward, measured = _load_functions(forward, metric)
    training_state = out.absolute().with_name(out.absolute().name + ".recovery.pt")
    small = compress_model(
        network,
        batches,
        params=params,
        macs=macs,
        memory=memory,
        latency=latency,
        max_drop=max_drop,
        contest=contest,
        energy=energy,
        fraction=fraction,
        evbmf=evbmf,
        layers=layers or "*",
        methods=methods or None,
        overrides=Overrides(keep=keep or ()),
        loss_metric=loss_metric,
        runtime=runtime,
        forward=run_forward,
        epochs=epochs,
        learning_rate=learning_rate,
        schedule=schedule,
        distance=_DISTANCES[distance],
        accumulation=accumulation,
        precision=precision,
        tensorboard=tensorboard,
        loss_fn=resolve_function(loss, "loss") if loss else None,
        checkpoint=training_state,
        elastic=elastic,
        merge=merge,
        test=judged,
        metric=measured,
        seed=seed,
        progress=_progress,
    )
    place_of_model = str(Path(model).absolute()) if is_pretrained(model) else model
    names = {"model": place_of_model, "data": data, "test": test, "metric": metric}
    names |= {"forward": forward, "text": str(Path(text).absolute()) if text else None}
    save(small, out, force=force, origin={key: name for key, name in names.items() if name})
    if not processes.leave():
        return
    training_state.unlink(missing_ok=True)
    comparison = record_of(small).comparison
    assert comparison is not None
    loaded = load(out, network)
    _verify(small, loaded, run_forward, judged)
    again = measure_metric(measured, loaded, judged) if measured else None
    if again != comparison.after.metric:
        raise CheckpointError(
            f"the saved model, loaded again, has metric {again}, not {comparison.after.metric}"
        )
    if as_json:
        _print_json(comparison, out=str(out))
        return
    console = Console()
    console.print(_layer_table(record_of(small).plan), comparison)
    if comparison.speedup < 1:
        console.print("[bold]No faster:[/] fewer MACs did not buy time here; keep the original.")
    found = "" if again is None else f" (metric {again:.4f})"
    console.print(f"saved to {out}; loaded again it gives the same outputs{found}")


@app.command(name="slice")
def slice_model(
    directory: Annotated[Path, typer.Argument(help="A saved model, of compress --elastic.")],
    out: Out,
    params: Params = None,
    macs: Macs = None,
    memory: Memory = None,
    latency: Latency = None,
    model: Annotated[
        str | None, typer.Option("--model", help="As for compress (default: what was used then).")
    ] = None,
    merge_with: Annotated[
        str | None,
        typer.Option("--merge", help="Import path of batches to find what can be merged."),
    ] = None,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Cut a smaller network out of an elastic one, at once and without data.

    The import path of the model that is remembered in the directory is used again, as by evaluate.
    """
    check_target(out, force)
    document = read_plan_document(directory)
    origin = document["origin"]
    model = model or origin.get("model")
    if not isinstance(model, str):
        raise CheckpointError(f"{directory} does not say its model: give --model")
    asked = {"params": params, "macs": macs, "memory": memory, "latency": latency}
    budget = {name: value for name, value in asked.items() if value is not None}
    if not budget:
        raise BudgetError("say what to slice to: --params, --macs, --memory or --latency")
    network = resolve_model(model).eval()
    small = slice_to(load(directory, network), **budget)
    if merge_with is not None:
        batch = next(first_batches(resolve_data(merge_with), 1, device_of(small)))
        small = merge_adjacent(small, batch)
    save(small, out, force=force, origin={**origin, "model": model})
    plan = record_of(small).plan
    if as_json:
        json.dump({"out": str(out), "plan": plan.to_json()}, sys.stdout, indent=1)
        sys.stdout.write("\n")
        return
    console = Console()
    console.print(_layer_table(plan))
    console.print(f"saved to {out}")


@app.command()
def evaluate(
    directory: Annotated[Path, typer.Argument(help="A saved model.")],
    model: Annotated[
        str | None, typer.Option("--model", help="As for compress (default: what was used then).")
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help="Likewise.")] = None,
    text: Annotated[str | None, typer.Option("--text", help="Likewise.")] = None,
    metric: Annotated[str | None, typer.Option("--metric", help="Likewise.")] = None,
    forward: Annotated[str | None, typer.Option("--forward", help="Likewise.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Load a saved model and measure it against the original.

    The import paths given to compress are remembered in the directory and used again, so code that
    they name is run: give --model and --data for a directory from someone you do not trust.
    """
    origin = read_plan_document(directory)["origin"]
    model = model or origin.get("model")
    if data is None and text is None:
        data, text = origin.get("test") or origin.get("data"), origin.get("text")
        text = None if data else text
    if not (isinstance(model, str) and isinstance(data or text, str)):
        raise CheckpointError(f"{directory} does not say its model and data: give --model, --data")
    place = _prepare(device, threads, seed)
    people.print(f"model {model}, data {data or text}", highlight=False)
    network, batches, _ = _load_inputs(model, data, text, None, place)
    run_forward, measured = _load_functions(
        forward or origin.get("forward"), metric or origin.get("metric")
    )
    small = load(directory, network)
    batch = next(first_batches(batches, 1, place))
    comparison = measure(
        in_fastest_memory_format(network, batch, run_forward, _progress),
        small,
        batches,
        metric=measured,
        forward=run_forward,
        progress=_progress,
    )
    if as_json:
        _print_json(comparison)
    else:
        Console().print(comparison)


def _prepare(device: str, threads: int | None, seed: int) -> torch.device:
    """Set threads and seed, and check that the device is there."""
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
        processes.join(place)
        people.quiet = not processes.is_first()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DeviceError(f"device '{device}' cannot be used here: {reason}") from error
    return place


def _load_inputs(
    model: str, data: str | None, text: str | None, test: str | None, place: torch.device
) -> tuple[nn.Module, Data, Data]:
    """The model on its device, in eval mode, the data, and the data to measure on."""
    if (data is None) == (text is None):
        raise CalibrationError(
            "give the batches with --data, or with --text a text to make them of"
        )
    network = resolve_model(model).to(place).eval()
    batches = resolve_data(data) if data is not None else resolve_text(text or "", model)
    return network, batches, resolve_data(test) if test else batches


def _load_functions(forward: str | None, metric: str | None) -> tuple[Forward, Metric | None]:
    return (
        resolve_function(forward, "forward") if forward else run,
        resolve_function(metric, "metric") if metric else None,
    )


def _verify(saved: nn.Module, loaded: nn.Module, forward: Forward, judged: Data) -> None:
    """Raise CheckpointError unless the loaded network gives what the saved one does, to the bit."""
    batch = next(first_batches(judged, 1, device_of(saved)))
    with torch.no_grad():
        outputs = [list(tensors_of(forward(network, batch))) for network in (saved, loaded)]
    if not all(torch.equal(ours, theirs) for ours, theirs in zip(*outputs, strict=True)):
        raise CheckpointError("the saved model, loaded again, does not give the same outputs")


def _progress(work: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """The `rankfold.progress.Progress` that draws a bar, on a terminal."""
    if total is None and isinstance(work, Sized):
        total = len(work)
    bar = ProgressBar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=people,
        transient=True,
        disable=not people.is_terminal,
        refresh_per_second=2,  # drawing takes a core from what is being timed
    )
    with bar:
        yield from bar.track(work, total=total, description=description)


def _layer_table(plan: Plan) -> Table:
    request = ", ".join(f"{name} {value}" for name, value in plan.request.items())
    table = Table(title=f"plan: {request}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("layer", overflow="fold")
    for column in ("parameters", "MACs", "method", "rank", "loss", "kept"):
        table.add_column(column, justify="right", no_wrap=True)
    for layer in plan.layers:
        table.add_row(
            layer.name or "(the model)",
            _short(layer.before.parameters),
            _short(layer.before.macs),
            layer.method or "-",
            "x".join(map(str, layer.rank or ())),
            f"{layer.loss:.3g}" if layer.method else "",
            _kept(layer.before, layer.after) if layer.method else "",
        )
    table.add_section()
    table.add_row(
        f"{len(plan.factorized)} of {len(plan.layers)} layers",
        _short(plan.before.parameters),
        _short(plan.before.macs),
        "",
        "",
        f"{plan.loss:.3g}",
        _kept(plan.before, plan.after),
    )
    reasons: dict[str, list[str]] = {}
    for layer in plan.layers:
        if layer.reason:
            reasons.setdefault(layer.reason, []).append(layer.name)
    lines = [f"dense: {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    table.caption = Text("\n".join(["kept: parameters / MACs", *lines]), justify="left")
    return table


def _trust(analysis: Analysis) -> Text:
    """How well predictions agreed with what was measured."""
    lines = [f"metric: {analysis.metric}"]
    for trial in analysis.trials:
        lines.append(
            f"  {trial.metric}, {100 * trial.macs:.0f} % of MACs: loss predicted "
            f"{trial.predicted:.3g}, measured {trial.measured:.3g}"
        )
    if analysis.checks:
        lines.append(
            f"  {len(analysis.checks)} layers replaced one by one: rank correlation of predicted "
            f"and measured loss {analysis.agreement:.2f}"
        )
    return Text("\n".join(lines))


def _short(number: int) -> str:
    """A count in thousands or millions."""
    return f"{number / 1e6:.2f} M" if number >= 1e6 else f"{number / 1e3:.1f} k"


def _kept(before: Cost, after: Cost) -> str:
    """Parameters and MACs that are left, in percent."""
    pairs = ((before.parameters, after.parameters), (before.macs, after.macs))
    return " / ".join(f"{100 * b / a:.0f} %" if a else "-" for a, b in pairs)


def _print_json(comparison: Comparison, **more: Any) -> None:
    """The comparison, and more beside it, as one JSON object on standard output."""
    json.dump({**asdict(comparison), "speedup": comparison.speedup, **more}, sys.stdout, indent=1)
    sys.stdout.write("\n")


def main() -> None:
    """Entry point: typed errors become one line on standard error and exit status 2."""
    try:
        app()
    except RankfoldError as error:
        line = " ".join(str(error).split())
        people.print(f"error: {line}", style="red", highlight=False, soft_wrap=True, markup=False)
        sys.exit(2)
