"""Structured sparsity on the demonstration network: what it removes, and what that brings.

Filters of the network as it is, and rank-one terms of it factorized, are shrunk by group lasso
while the network is trained towards its own outputs on the training images of Fashion-MNIST without
their labels; what became 0 is taken out, and the rest is recovered on the same. Rank-one terms are
compared with a plan of as many MACs that is recovered for as long in all.

What is done is kept in benchmarks/sparsity.json and not done again, trained on a GPU where there is
one; `--clock` times the networks, on two threads of an otherwise idle processor, and writes the
tables of docs/sparsity.md.
"""

import copy
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from from_scratch import Training
from paired import paired_times
from race import between_markers, machine, markdown_table, save
from torch import nn

import rankfold
from rankfold import demo, sparsity
from rankfold.batches import run
from rankfold.cost import count_macs, count_parameters

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "sparsity.md"
EPOCHS = (12, 6)  # with group lasso, and after what is 0 was taken out
LEARNING_RATES = (2e-3, 1e-3)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # of training
START = 0.5  # of the MACs, what the network is factorized to before its ranks are shrunk


@dataclass(frozen=True)
class Experiment:
    """One training with group lasso; without a strength, what it is compared with."""

    kind: sparsity.Kind
    strength: float | None
    macs: float | None = None  # of the plan it is compared with

    @property
    def name(self) -> str:
        return f"{self.kind} {self.strength if self.macs is None else f'planned {self.macs:.3f}'}"


EXPERIMENTS = tuple(
    Experiment(kind, strength)
    for kind, strengths in (
        ("filters", (0.002, 0.004, 0.006, 0.01)),
        ("ranks", (0.01, 0.02, 0.04)),
    )
    for strength in strengths
)


class Images(Training):
    """Without labels."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        for images, _ in super().__iter__():
            yield images.to(memory_format=torch.channels_last)


def network(experiment: Experiment, path: Path) -> nn.Module:
    """What is trained: the network as it is, or factorized by a plan for all its MACs."""
    model = demo.make_model().to(memory_format=torch.channels_last)
    if experiment.kind == "filters":
        return model
    target = START if experiment.macs is None else experiment.macs
    if not path.exists():
        rankfold.analyze(model, demo.make_data(), metric="response").save(path)
    analysis = rankfold.Analysis.load(path)
    return rankfold.factorize(model, analysis.plan(macs=target))


def run_one(experiment: Experiment, path: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    start = time.perf_counter()
    teacher = demo.make_model().to(DEVICE, memory_format=torch.channels_last)
    model = network(experiment, path).to(DEVICE)
    example = demo.make_data()[0].to(DEVICE)
    recover = partial(rankfold.recover, teacher=teacher, precision="bfloat16")
    first, last = (
        {"epochs": epochs, "learning_rate": rate}
        for epochs, rate in zip(EPOCHS, LEARNING_RATES, strict=True)
    )
    facts: dict[str, Any] = {"kind": experiment.kind, "strength": experiment.strength}
    small = model
    if experiment.strength is None:
        recover(model, Images(), **first)
    else:
        lasso = sparsity.GroupLasso(
            model, example, strength=experiment.strength, over=(experiment.kind,)
        )
        recover(model, Images(), after_step=lasso, **first)
        facts["zero"], facts["groups"] = lasso.zero_groups(model)[experiment.kind]
        facts["accuracy_with_zeros"] = rankfold.accuracy(model, demo.make_test())
        removal = sparsity.find_zero_groups(model, example)
        small = sparsity.remove(model, removal)
        facts["removal"] = json.dumps(removal.to_json())  # one line
    recover(small, Images(), **last)
    facts |= {
        "accuracy": rankfold.accuracy(small, demo.make_test()),
        "share_of_macs": macs_of(small, example) / macs_of(teacher, example),
        "parameters": count_parameters(small),
        "macs": macs_of(small, example),
        "planned": experiment.macs,
        "seconds": time.perf_counter() - start,
    }
    return facts


def macs_of(model: nn.Module, example: torch.Tensor) -> int:
    """Of one image."""
    return count_macs(lambda: run(model, example[:1]))


def missing(done: dict[str, Any], only: Sequence[str]) -> Iterable[Experiment]:
    """What is not done yet; of rank-one terms, when they are, what to compare them with."""
    for experiment in EXPERIMENTS:
        if only and experiment.name not in only:
            continue
        if experiment.name not in done:
            yield experiment
        if experiment.kind == "ranks":
            share = done[experiment.name]["share_of_macs"]
            compared = Experiment("ranks", None, round(share, 3))
            if compared.name not in done:
                yield compared


def shape_of(facts: dict[str, Any], path: Path) -> nn.Module:
    """The network of an experiment, of other weights."""
    model = network(Experiment(facts["kind"], facts["strength"], facts["planned"]), path)
    if "removal" in facts:
        model = sparsity.remove(model, sparsity.Removal.from_json(json.loads(facts["removal"])))
    return model.eval()


def main(
    threads: int = 1,
    clock: bool = False,
    out: Path = HERE / "sparsity.json",
    most: int = 100,
    only: Annotated[list[str] | None, typer.Option(help='such as "filters 0.01"')] = None,
) -> None:
    torch.set_num_threads(threads)
    path = HERE / "cache" / "sparsity-analysis"
    done = json.loads(out.read_text()) if out.exists() else {}
    done.setdefault("dense", {"accuracy": rankfold.accuracy(demo.make_model(), demo.make_test())})
    for _, experiment in zip(range(most), missing(done, only or ()), strict=False):
        done[experiment.name] = run_one(experiment, path)
        facts = {key: value for key, value in done[experiment.name].items() if key != "removal"}
        print(experiment.name, facts, flush=True)
        save(out, done)
    if clock:
        dense, batch = demo.make_model(), demo.make_data()[0]
        for facts in done.values():
            if "kind" in facts:
                small = shape_of(facts, path)
                facts["milliseconds"] = paired_times(copy.deepcopy(dense), small, batch)
        done["machine"] = machine()
        save(out, done)
    write_document(done)


def write_document(done: dict[str, Any]) -> None:
    dense = done["dense"]["accuracy"]
    for kind, what in {"filters": "filters that are 0", "ranks": "terms that are 0"}.items():
        header = ("strength", what, "parameters", "MACs", "time", "accuracy", "before recovery")
        rows = [_row(facts, dense) for facts in done.values() if facts.get("kind") == kind]
        on = ", ".join(f"{name} {value}" for name, value in done.get("machine", {}).items())
        measured = f"\nMeasured on: {on}.\n" if on else ""
        between_markers(DOCUMENT, kind, markdown_table(header, rows) + measured)


def _row(facts: dict[str, Any], dense: float) -> tuple[str, ...]:
    before, after = facts.get("milliseconds", (0.0, 0.0))
    zero = f"{facts['zero']} of {facts['groups']}" if "zero" in facts else ""
    with_zeros = facts.get("accuracy_with_zeros")
    return (
        "planned" if facts["strength"] is None else str(facts["strength"]),
        zero,
        f"{facts['parameters'] / 1e6:.2f} M",
        f"{facts['macs'] / 1e6:.1f} M",
        f"{before:.1f} → {after:.1f} ms, {before / after:.2f}x" if after else "",
        f"{facts['accuracy']:.2%} ({100 * (facts['accuracy'] - dense):+.2f})",
        "" if with_zeros is None else f"{with_zeros:.2%}",
    )


if __name__ == "__main__":
    typer.run(main)
