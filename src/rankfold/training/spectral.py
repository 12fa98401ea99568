"""A network that was never trained, in factors."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from rankfold.analysis import Overrides, analyze
from rankfold.batches import Data, Forward, run
from rankfold.errors import BudgetError
from rankfold.factorize import factorize
from rankfold.methods import Methods
from rankfold.progress import Progress, silent

_NO_OVERRIDES = Overrides()


def spectral_initialisation(
    model: nn.Module,
    data: Data,
    *,
    params: float | None = None,
    macs: float | None = None,
    memory: float | None = None,
    fraction: float | None = None,
    layers: str | Sequence[str] = "*",
    methods: Methods | None = ("svd",),
    overrides: Overrides = _NO_OVERRIDES,
    forward: Forward = run,
    progress: Progress = silent,
) -> nn.Module:
    """The factorized twin of a freshly initialised network, to be trained from there.

    Its factors are from the truncated singular value decompositions of the random weights, of the
    same norm each: it starts where the dense network would, but for what truncation takes, while
    factors drawn at random by themselves have products of another distribution (Khodak, Tenenholtz,
    Mackey, Fusi: Initialization and regularization of factorized neural layers. ICLR 2021; with it
    goes `FrobeniusDecay`).

    It is what `analyze(metric="weight")`, `plan` and `factorize` make of any network. Random
    weights have no small singular values to leave out: `fraction`, of full rank, is the same
    everywhere; a budget (see `Analysis.plan`) takes from where that is cheapest. One `data` batch
    is looked at for its shapes. Raises BudgetError unless something is asked for, or if it cannot
    be reached.
    """
    asked = {"params": params, "macs": macs, "memory": memory, "fraction": fraction}
    given: Any = {name: value for name, value in asked.items() if value is not None}
    if not given:
        raise BudgetError("ask for params, macs, memory or fraction: random weights set no rank")
    analysis = analyze(
        model,
        data,
        forward=forward,
        layers=layers,
        methods=methods,
        metric="weight",
        batches=1,
        progress=progress,
    )
    plan = analysis.plan(**given, overrides=overrides)
    return factorize(model, plan, progress=progress)
