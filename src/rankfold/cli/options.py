"""Arguments and options that commands have in common."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from rankfold.distances import Cosine, Distance, Divergence, SquaredError, Transcription
from rankfold.runtime import Runtime


class DistanceName(StrEnum):
    """What recovery lowers (`rankfold.distances`)."""

    squared = "squared"
    divergence = "divergence"
    transcription = "transcription"
    cosine = "cosine"


DISTANCES: dict[DistanceName, Distance] = {
    DistanceName.squared: SquaredError(),
    DistanceName.divergence: Divergence(),
    DistanceName.transcription: Transcription(),
    DistanceName.cosine: Cosine(),
}

ModelPath = Annotated[
    str,
    typer.Argument(
        help="Import path of a model or its factory: pkg:name; timm:name, torchvision:name; "
        "or a directory of transformers."
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
Trust = Annotated[
    bool,
    typer.Option("--trust", help="Import and run what the directory names: it is your own."),
]
Out = Annotated[Path, typer.Option("--out", help="Directory for the saved model.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a saved model that is there.")]
