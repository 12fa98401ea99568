"""Perplexity of a language model whose matrices are factorized, before and after recovery.

By the plain SVD, ASVD and SVD-LLM, each at one fraction of full rank everywhere, and by rankfold's
default: the metric that fits best, and ranks of the whole network. All are two factors for each
matrix; the budget is one of the parameters of the whole network, the tied embedding included, which
stays. Writes benchmarks/language_model.json and a table of docs/transformers.md. What is in the
file already is not done again.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
import typer
from language_model_network import make_data, make_model, make_test, perplexity
from planning import at_budget
from race import between_markers, machine, markdown_table, save
from torch import nn

import rankfold
from rankfold.analysis import Analysis
from rankfold.distances import Divergence
from rankfold.methods import LowRank
from rankfold.plan import Plan

HERE = Path(__file__).parent
RESULTS = HERE / "language_model.json"
DOCUMENT = HERE.parent / "docs" / "transformers.md"
BUDGETS = (0.8, 0.6, 0.4)
EPOCHS, LEARNING_RATE = 2, 2e-4
# Metric, and whether one fraction of full rank is kept everywhere.
CONTENDERS: dict[str, tuple[str, bool]] = {
    "SVD": ("weight", True),
    "ASVD": ("asvd", True),
    "SVD-LLM": ("svd-llm", True),
    "rankfold": ("auto", False),
}
LAYERS = ("blocks.*",)


def analysis_of(model: nn.Module, name: str, data: list[torch.Tensor]) -> Analysis:
    metric, is_uniform = CONTENDERS[name]
    method = LowRank(alignment=1 if is_uniform else 8)  # or a fraction would not meet the budget
    return rankfold.analyze(
        model, data, methods=[method], layers=LAYERS, metric=metric, check=not is_uniform
    )


def plan_of(analysis: Analysis, name: str, budget: float) -> Plan:
    if CONTENDERS[name][1]:
        return at_budget(lambda f: analysis.plan(fraction=f or 1e-3), "parameters", budget)
    return analysis.plan(params=budget)


def run(
    model: nn.Module, analysis: Analysis, name: str, budget: float, data: list[torch.Tensor]
) -> dict[str, Any]:
    plan, test = plan_of(analysis, name, budget), make_test()
    small = rankfold.factorize(model, plan)
    before = perplexity(small.eval(), test)
    recovery = rankfold.recover(
        small,
        data,
        teacher=model,
        distance=Divergence(),
        epochs=EPOCHS,
        learning_rate=LEARNING_RATE,
    )
    return {
        "metric": analysis.metric,
        "kept": plan.after.parameters / plan.before.parameters,
        "before": before,
        "after": perplexity(small.eval(), test),
        "seconds": recovery.seconds,
    }


def table_of(results: dict[str, Any]) -> str:
    header = ["parameters kept", *(f"{100 * b:.0f} %" for b in BUDGETS)]
    rows = []
    for state in ("before", "after"):
        for name in CONTENDERS:
            cells = []
            for budget in BUDGETS:
                found = results["runs"].get(f"{name} | {budget}")
                cells.append("" if found is None else f"{found[state]:.2f}")
            rows.append([f"{name}, {'factorized' if state == 'before' else 'recovered'}", *cells])
    return markdown_table(header, rows)


def main(seconds: float = 1e9) -> None:
    """Do what is missing, for so many seconds, then write the table of what there is."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = time.perf_counter()
    model, data = make_model(), make_data()
    if RESULTS.exists():
        results = json.loads(RESULTS.read_text())
    else:
        parameters = sum(one.numel() for one in model.parameters())
        dense = perplexity(model, make_test())
        results = {"machine": machine(), "parameters": parameters, "dense": dense, "runs": {}}
    for name in CONTENDERS:
        missing = [b for b in BUDGETS if f"{name} | {b}" not in results["runs"]]
        if not missing or time.perf_counter() - start > seconds:
            continue
        analysis = analysis_of(model, name, data)
        for budget in missing:
            if time.perf_counter() - start > seconds:
                break
            found = run(model, analysis, name, budget, data)
            results["runs"][f"{name} | {budget}"] = found
            print(name, budget, found, flush=True)
            save(RESULTS, results)
    text = f"The dense network's perplexity is {results['dense']:.2f}.\n\n" + table_of(results)
    between_markers(DOCUMENT, "language model", text)


if __name__ == "__main__":
    typer.run(main)
