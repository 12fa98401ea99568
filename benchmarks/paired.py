"""A network and what some of its layers became: made of a list of choices, and timed beside it."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

import rankfold
from rankfold.analysis import AnalysedLayer, Analysis
from rankfold.batches import run
from rankfold.cost import count_macs
from rankfold.measure import latencies, with_memory_format
from rankfold.methods import METHODS, reduction
from rankfold.plan import LayerPlan, Plan
from rankfold.replacement import put_in_place

Choices = Mapping[str, tuple[str, Sequence[int]]]  # by layer: method and rank


def choices_of(plan: Plan) -> dict[str, tuple[str, Sequence[int]]]:
    return {entry.name: (str(entry.method), entry.rank or ()) for entry in plan.factorized}


def factorized(model: nn.Module, analysis: Analysis, choices: Choices) -> nn.Module:
    """The network with these layers factorized in the metric of the analysis.

    Of the analysis only the moments count: it need not have tried the methods.
    """
    dense = analysis.plan(macs=1.0)
    entries = tuple(_entry(entry, choices.get(entry.name)) for entry in dense.layers)
    return rankfold.factorize(model, replace(dense, layers=entries)).eval()


def _entry(entry: LayerPlan, choice: tuple[str, Sequence[int]] | None) -> LayerPlan:
    if choice is None:
        return replace(entry, method=None, settings=None, rank=None, reason="left as it is")
    method, rank = choice
    return replace(entry, method=method, settings={}, rank=tuple(rank), reason=None)


def restricted(analysis: Analysis, methods: Sequence[str], instead: str | None = None) -> Analysis:
    """As if it had tried only these methods, and one `instead` where none of them applies."""

    def allowed(layer: AnalysedLayer) -> Sequence[str | None]:
        return [name for name in methods if name in layer.methods] or [instead]

    layers = tuple(
        replace(layer, candidates=tuple(c for c in layer.candidates if c.method in allowed(layer)))
        for layer in analysis.layers
    )
    return replace(analysis, layers=layers)


def of_these_shapes(model: nn.Module, choices: Choices) -> nn.Module:
    """The same with arbitrary weights: as quick, and nothing has to be fitted."""
    small = copy.deepcopy(model).eval()
    made = {}
    for name, (method, rank) in choices.items():
        layer = small.get_submodule(name)
        form = reduction.skeleton(METHODS[method](), layer, tuple(rank)).to_empty(device="cpu")
        with torch.no_grad():
            for tensor in (*form.parameters(), *form.buffers()):
                if tensor.is_floating_point():
                    tensor.normal_(0, 0.01)
                else:  # places of channels
                    tensor.random_(0, min(rank))
        made[layer] = form.eval()
    return put_in_place(small, made)


def share_of_macs(model: nn.Module, small: nn.Module, batch: torch.Tensor) -> float:
    kept, all_of_them = (count_macs(lambda m=one: run(m, batch)) for one in (small, model))
    return kept / all_of_them


def paired_times(
    model: nn.Module, small: nn.Module, batch: torch.Tensor, seconds: float = 1.0
) -> tuple[float, float]:
    """Milliseconds of both, in turns, each in the memory format in which it is faster."""
    networks = [
        with_memory_format(one, memory_format)
        for one in (model, small)
        for memory_format in ("contiguous", "channels_last")
    ]
    with torch.no_grad():
        calls = [lambda m=network: run(m, batch) for network in networks]
        dense, dense_last, ours, ours_last = latencies(calls, torch.device("cpu"), seconds=seconds)
    return min(dense, dense_last), min(ours, ours_last)
