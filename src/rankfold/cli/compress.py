"""`rankfold compress`."""

import hashlib
import shutil
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

from rankfold import processes
from rankfold.analysis import Overrides
from rankfold.batches import Data, Forward, device_of, first_batches, tensors_of
from rankfold.checkpoint import INCOMING, PLAN, check_target, load, save
from rankfold.cli.console import print_json, progress, results
from rankfold.cli.inputs import load_functions, load_inputs, prepare
from rankfold.cli.options import (
    DISTANCES,
    DataPath,
    Device,
    DistanceName,
    Energy,
    Epochs,
    Evbmf,
    Force,
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
    Out,
    Params,
    RuntimeName,
    Seed,
    TestPath,
    TextPath,
    Threads,
)
from rankfold.cli.recipe import Config, SaveRecipe, write_recipe
from rankfold.cli.report import REPORT
from rankfold.compress import UNASKED_DROP
from rankfold.compress import compress as compress_model
from rankfold.errors import CheckpointError
from rankfold.files import replace_file
from rankfold.imports import resolve_function
from rankfold.journal import Journal
from rankfold.measure import evaluate as measure_metric
from rankfold.pretrained import is_pretrained
from rankfold.record import record_of
from rankfold.recover import Precision, Schedule
from rankfold.report import write_report

_PLACED = "placed/model"  # in the journal


def compress(
    context: typer.Context,
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
        typer.Option(
            "--max-drop",
            help="Fewest MACs that lose so much of the metric at most before recovery; with no "
            f"budget and no rule, {UNASKED_DROP}.",
        ),
    ] = None,
    contest: Annotated[
        bool,
        typer.Option(
            "--contest", help="Let the metric choose: all methods, one, all but one, by MACs."
        ),
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
    sharded: Annotated[
        bool,
        typer.Option(
            "--sharded", help="Of several processes each holds a share of the weights in recovery."
        ),
    ] = False,
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
    config: Config = None,
    save_recipe: SaveRecipe = None,
) -> None:
    """Analyze, plan, factorize, recover, save; then load what was saved and measure that.

    Import paths, on the command line or in a recipe, name code of yours: it is imported and run.

    Killed at any point, the same command goes on where it was: what is finished is kept in a hidden
    directory beside the one for the saved model until that is in its place.
    """
    if save_recipe is not None:
        write_recipe(context, save_recipe)
    place = prepare(device, threads, seed)
    with Journal(journal_of(out)) as journal:
        if not _is_in_place(out, journal):
            # What is there may be half of what this command was putting there.
            check_target(out, force or journal.kept(_PLACED) is not None)
        network, batches, judged = load_inputs(model, data, text, test, place)
        run_forward, measured = load_functions(forward, metric)
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
            distance=DISTANCES[distance],
            accumulation=accumulation,
            precision=precision,
            sharded=sharded,
            tensorboard=tensorboard,
            loss_fn=resolve_function(loss, "loss") if loss else None,
            elastic=elastic,
            merge=merge,
            test=judged,
            metric=measured,
            seed=seed,
            journal=journal,
            force=force,
            progress=progress,
        )
        place_of_model = str(Path(model).absolute()) if is_pretrained(model) else model
        names = {"model": place_of_model, "data": data, "test": test, "metric": metric}
        names |= {"forward": forward, "text": str(Path(text).absolute()) if text else None}
        origin = {key: name for key, name in names.items() if name}
        if not processes.leave():
            return
        comparison = record_of(small).comparison
        assert comparison is not None
        if not _is_in_place(out, journal):
            room = journal.path(f"result/{out.absolute().name}")
            assert room is not None
            save(small, room, force=True, origin=origin)
            loaded = load(room, network)
            verify(small, loaded, run_forward, judged)
            again = measure_metric(measured, loaded, judged) if measured else None
            if again != comparison.after.metric:
                raise CheckpointError(
                    f"the saved model, loaded again, has metric {again}, not "
                    f"{comparison.after.metric}"
                )
            if find_spec("plotly") is not None:
                write_report(record_of(small), room / REPORT, title=out.name, origin=origin)
            # The journal knows what comes there, for a process that is killed before it is gone.
            journal.forget(_PLACED)
            journal.once(_PLACED, lambda: _file_sha256(room / PLAN))
            if out.exists():
                save(small, out, force=True, origin=origin)
                if (room / REPORT).is_file():
                    replace_file(out / REPORT, partial(shutil.copyfile, room / REPORT))
            else:
                room.rename(out)
        tell(small, out, as_json)
        journal.remove()


def tell(small: nn.Module, out: Path, as_json: bool) -> None:
    comparison = record_of(small).comparison
    assert comparison is not None
    if as_json:
        print_json(comparison, out=str(out))
        return
    results.print(record_of(small).plan, comparison)
    has_report = (out / REPORT).is_file()
    where = out / REPORT if has_report else "none; pip install 'rankfold[report]' for one"
    results.print(f"report: {where}", markup=False)
    if comparison.speedup < 1:
        results.print("[bold]No faster:[/] fewer MACs did not buy time here; keep the original.")
    metric = comparison.after.metric
    found = "" if metric is None else f" (metric {metric:.4f})"
    results.print(f"saved to {out}; loaded again it gives the same outputs{found}")


def journal_of(out: Path) -> Path:
    """Where what is finished is kept until the saved model is in its place."""
    whole = out.absolute()
    return whole.with_name(f".{whole.name}.journal")


def _is_in_place(out: Path, journal: Journal) -> bool:
    """Whether the saved model is there, whole, which this journal's command was putting there."""
    room = journal.path(f"result/{out.absolute().name}")
    assert room is not None
    if not (out / PLAN).is_file() or (out / INCOMING).exists():
        return False
    report = _file_sha256(room / REPORT)
    if report is not None and report != _file_sha256(out / REPORT):  # it is copied last
        return False
    return bool(journal.kept(_PLACED) == _file_sha256(out / PLAN))


def _file_sha256(path: Path) -> str | None:
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(saved: nn.Module, loaded: nn.Module, forward: Forward, judged: Data) -> None:
    """Raise CheckpointError unless the loaded network gives what the saved one does, to the bit."""
    batch = next(first_batches(judged, 1, device_of(saved)))
    with torch.no_grad():
        outputs = [list(tensors_of(forward(network, batch))) for network in (saved, loaded)]
    if not all(torch.equal(ours, theirs) for ours, theirs in zip(*outputs, strict=True)):
        raise CheckpointError("the saved model, loaded again, does not give the same outputs")
