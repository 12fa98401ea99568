"""How much of the accuracy comes back: in closed form, and in minutes without labels.

The demo network at a quarter of its MACs: factorized, its last factors refitted, and after epochs
on 5 000 images without labels. Larger networks after fitting and after minutes of recovery. What a
recovery takes beside a plain training loop. Writes recovery.json, in which what is there is not
done again, recoveries that were too short excepted, and tables of docs/recovery.md.
"""

import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from race import between_markers, machine, markdown_table, save
from torch import nn

import rankfold
from rankfold.distances import Cosine, Distance, Divergence, SquaredError

HERE = Path(__file__).parent
RESULTS = HERE / "recovery.json"
DOCUMENT = HERE.parent / "docs" / "recovery.md"
KEPT = HERE / "cache" / "recovered"  # after minutes of recovery
STEPS = ("demo", "minutes", "overhead")
# Methods whose last factor is 1x1, all of which can be refitted, and the default ones.
METHODS = {"default": None, "tucker2, svd": ["tucker2", "svd"]}
MINUTES = (1, 5, 20)
LEAST = 0.7  # of the minutes: what took less, since later epochs are faster, is done again
ROUNDS, IMAGES = 20, 1000  # of the overhead: many short turns, since the machine's speed drifts


def demo(methods: list[str] | None) -> dict[str, Any]:
    """Accuracy of the demo network at a quarter of its MACs, step by step."""
    from rankfold.demo import accuracy, make_data, make_model, make_test

    model, data, test = make_model(), make_data(), make_test()
    plan = rankfold.analyze(model, data, methods=methods).plan(macs=0.25)
    found = {"dense": accuracy(model, test)}
    factorized = rankfold.factorize(model, plan).eval()
    found["factorized"] = accuracy(factorized, test)
    names = [entry.name for entry in plan.factorized]
    for through_relu in (False, True):
        fitted = copy.deepcopy(factorized)
        rankfold.refit(fitted, model, data, names, through_relu=through_relu)
        found["refitted through ReLU" if through_relu else "refitted"] = accuracy(fitted, test)
    for title, start, epochs in (
        ("one epoch", factorized, 1),
        ("refitted, one epoch", fitted, 1),
        ("three epochs", factorized, 3),
    ):
        small = copy.deepcopy(start)
        done = rankfold.recover(small, data, teacher=model, epochs=epochs)
        found[title] = accuracy(small.eval(), test)
        found[f"{title}, seconds"] = done.seconds
    return found


@dataclass(frozen=True)
class Case:
    model: nn.Module
    small: nn.Module
    data: list[Any]
    score: Callable[[nn.Module], float]
    distance: Distance
    learning_rate: float
    unit: str


def crepe_case() -> Case:
    import crepe

    model, test = crepe.make_model(), crepe.make_test()
    analysis = rankfold.analyze(model, crepe.make_data(), methods=("tucker2", "svd", "separable"))
    # Of a fifth of the MACs nothing is left to bring back: 99.9 % are right where 99.8 % were.
    small = rankfold.factorize(model, analysis.plan(macs=0.05))
    frames = crepe.tones(12_000, seed=2)[0]
    data = list(frames.split(32))
    return Case(
        model, small, data, lambda m: crepe.accuracy(m, test), SquaredError(), 3e-4, "pitches"
    )


def recogniser_case() -> Case:
    import recogniser
    from ocr_models import make_recogniser
    from rendered_text import split_fonts, word_batches
    from scene_text import words_right

    model = make_recogniser()
    small = rankfold.load(recogniser.KEPT / "factorized-0.37", make_recogniser)
    fonts, held_out = split_fonts()
    data = [images for images, _ in word_batches(12_000, fonts, seed=2)]
    test = word_batches(1_000, held_out, seed=1)
    return Case(
        *(model, small, data, lambda m: words_right(m.eval(), test)), Divergence(2.0), 1e-3, "words"
    )


def sentence_case() -> Case:
    import minilm
    import sentence_embeddings

    model = minilm.make_model()
    analysis = rankfold.analyze(model, minilm.make_data(), layers="network.encoder.*")
    able = sum(layer.parameters for layer in analysis.layers if layer.reason is None)
    small = rankfold.factorize(model, analysis.plan(params=1 - 0.5 * able / analysis.parameters))
    data = sentence_embeddings.batches()
    return Case(model, small, data, lambda m: minilm.scores(m)[0], Cosine(), 2e-4, "WordSim353")


CASES = {"CREPE": crepe_case, "english_g2": recogniser_case, "MiniLM": sentence_case}


def in_minutes(
    case: Case, fitted: nn.Module, minutes: float, per_batch: float
) -> tuple[nn.Module, dict[str, float]]:
    """A recovery of about so long: of so many batches as that takes, or of so many epochs."""
    count = max(12, round(60 * minutes / per_batch))
    epochs = max(1, round(count / len(case.data)))
    data = case.data[: max(12, count // epochs)]
    small = copy.deepcopy(fitted)
    done = rankfold.recover(
        small,
        data,
        teacher=case.model,
        distance=case.distance,
        epochs=epochs,
        learning_rate=case.learning_rate,
        patience=epochs,
    )
    return small, {
        "seconds": done.seconds,
        "epochs": epochs,
        "batches": epochs * len(data),
        "score": case.score(small.eval()),
    }


def in_a_trial(case: Case, fitted: nn.Module) -> float:
    """Seconds that a batch takes, the beginning and the end of a recovery with it."""
    start = time.perf_counter()
    rankfold.recover(
        copy.deepcopy(fitted),
        case.data[:12],
        teacher=case.model,
        distance=case.distance,
        validation=case.data[:1],
        epochs=1,
    )
    return (time.perf_counter() - start) / 12


def refitted(case: Case) -> nn.Module:
    small = copy.deepcopy(case.small)
    names = [entry.name for entry in rankfold.record_of(small).plan.factorized]
    there = dict(small.named_modules())
    rankfold.refit(small, case.model, case.data, [name for name in names if name in there])
    return small.eval()


def overhead() -> dict[str, list[float]]:
    """Seconds of an epoch, in turns: of `recover`, and of a loop with nothing but the training.

    Both end with the loss on a batch that was held out.
    """
    from rankfold.demo import make_data, make_model

    model, data = make_model(), make_data()
    plan = rankfold.analyze(model, data, metric="weight").plan(macs=0.25)
    data, held_out = data[: IMAGES // len(data[0])], data[-1:]
    seconds: dict[str, list[float]] = {"recover": [], "plain loop": []}
    for turn in range(-1, ROUNDS):  # the first to warm up
        for name in sorted(seconds, reverse=turn % 2 == 0):
            small = rankfold.factorize(model, plan)
            start = time.perf_counter()
            if name == "recover":
                rankfold.recover(small, data, teacher=model, epochs=1, validation=held_out)
            else:
                plain_epoch(small, model, data, held_out)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def plain_epoch(
    small: nn.Module, teacher: nn.Module, data: list[torch.Tensor], held_out: list[torch.Tensor]
) -> float:
    """Batch norms re-estimated, then the same optimizer, distance and order as `recover`."""
    rankfold.reestimate_batch_norm(small, data)
    optimizer = torch.optim.Adam(small.parameters(), 3e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(data))
    distance = SquaredError()
    small.eval()
    for index in torch.randperm(len(data)).tolist():
        with torch.no_grad():
            target = teacher(data[index])
        loss = distance(small(data[index]), target)
        loss.backward()
        nn.utils.clip_grad_norm_(small.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return sum(distance(small(batch), teacher(batch)).item() for batch in held_out)


def main(
    step: Annotated[list[str] | None, typer.Option(help="demo, minutes, overhead")] = None,
    only: Annotated[list[str] | None, typer.Option(help="of the networks of minutes")] = None,
    most: Annotated[float, typer.Option(help="minutes of one recovery")] = 20,
    threads: int = 2,
) -> None:
    torch.set_num_threads(threads)
    sys.path.append(str(HERE.parent / "examples"))
    facts: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    machines = facts.setdefault("machines", {})
    for name in step or STEPS:
        found = facts.setdefault(name, {})
        machines[name] = machine()
        if name == "demo":
            for title, methods in METHODS.items():
                if title not in found:
                    torch.manual_seed(0)
                    found[title] = demo(methods)
                    print(title, found[title], flush=True)
                    save(RESULTS, facts)
        elif name == "overhead":
            facts["overhead"] = overhead()
            print(facts["overhead"], flush=True)
        else:
            for network in only or CASES:
                minutes(network, found.setdefault(network, {}), most, facts)
        save(RESULTS, facts)
    write_document(facts)


def minutes(network: str, found: dict[str, Any], most: float, facts: dict[str, Any]) -> None:
    torch.manual_seed(0)
    case = CASES[network]()
    start = time.perf_counter()
    fitted = refitted(case)
    if "dense" not in found:
        found["seconds to refit"] = time.perf_counter() - start
        found |= {"dense": case.score(case.model), "factorized": case.score(case.small.eval())}
        found |= {"fitted": case.score(fitted), "unit": case.unit}
        print(network, found, flush=True)
        save(RESULTS, facts)
    for length in MINUTES:
        cell = found.get(str(length))
        while length <= most and not is_enough(cell, length, found["dense"]):
            known = cell if cell and "batches" in cell else None
            rate = known["seconds"] / known["batches"] if known else in_a_trial(case, fitted)
            small, cell = in_minutes(case, fitted, length, rate)
            found[str(length)] = cell
            rankfold.save(small, KEPT / f"{network}-{length}", force=True)
            print(network, length, cell, flush=True)
            save(RESULTS, facts)


def is_enough(cell: dict[str, float] | None, length: int, dense: float) -> bool:
    """Whether it took about as long as it should, or nothing was left to bring back."""
    return cell is not None and (cell["seconds"] > LEAST * 60 * length or cell["score"] >= dense)


def write_document(facts: dict[str, Any]) -> None:
    on = {
        step: "Measured on: " + ", ".join(f"{name} {value}" for name, value in known.items())
        for step, known in facts["machines"].items()
    }
    if rows := facts.get("demo"):
        states = [name for name in next(iter(rows.values())) if "seconds" not in name]
        table = markdown_table(
            ("methods", *states),
            [(name, *(f"{100 * row[s]:.2f}" for s in states)) for name, row in rows.items()],
        )
        between_markers(DOCUMENT, "demo", f"{table}\n{on['demo']}.\n")
    if rows := facts.get("minutes"):
        lines = []
        for name, row in rows.items():
            cells = [f"{100 * row[state]:.1f}" for state in ("dense", "factorized", "fitted")]
            for length in map(str, MINUTES):
                cell = row.get(length)
                text = f"{100 * cell['score']:.1f} ({cell['seconds'] / 60:.1f} min)" if cell else ""
                cells.append(text)
            lines.append((f"{name}, {row['unit']}", *cells))
        header = ("network", "dense", "factorized", "refitted", *(f"{m} min" for m in MINUTES))
        table = markdown_table(header, lines)
        between_markers(DOCUMENT, "minutes", f"{table}\n{on['minutes']}.\n")
    if seconds := facts.get("overhead"):
        ours, plain = (statistics.median(seconds[name]) for name in ("recover", "plain loop"))
        pairs = zip(seconds["recover"], seconds["plain loop"], strict=True)
        more = 100 * (statistics.median(a / b for a, b in pairs) - 1)
        text = (
            f"An epoch of the demo network on {IMAGES:,} images: {ours:.1f} s by `recover`, "
            f"{plain:.1f} s by a plain loop, in turns, medians of {ROUNDS}; the median of "
            f"the ratios of neighbours is {more:+.1f} %.\n\n{on['overhead']}.\n"
        )
        between_markers(DOCUMENT, "overhead", text)


if __name__ == "__main__":
    typer.run(main)
