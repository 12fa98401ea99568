"""The rank of each layer learned with its weights: the learning-compression algorithm (LC).

Idelbayev, Carreira-Perpiñán: Low-rank compression of neural nets: learning the rank of each layer.
CVPR 2020. To make loss(W) + λ cost(ranks) least, over weights W that are Θ of these ranks,

    L step    train W on loss(W) + μ ‖W - Θ - U‖², a quadratic pull towards Θ
    C step    find Θ and its ranks, of the least λ cost(ranks) + μ ‖W - U - Θ‖²: exactly, per layer
              multipliers, scaled by 1 / μ: U ← U - (W - Θ)

in turn, while μ grows; U is zero where the penalty is all there is. With a budget in the place of
λ the C step is the exact plan of an analysis. In another metric than the plain one, the C step
finds the Θ whose error costs least there, and the pull has each layer's mean of it: pulled in the
metric itself, weights that it hardly sees do not come along.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from rankfold.analysis import AnalysedLayer, Analysis, Overrides, analyze
from rankfold.analysis.planning import COSTS
from rankfold.batches import Data, Forward, device_of, first_batches, run
from rankfold.copies import copy_of
from rankfold.distances import Distance, SquaredError
from rankfold.errors import BudgetError, RankfoldError
from rankfold.factorize import factorize
from rankfold.journal import Journal, Pathlike, opened
from rankfold.layers import CONVOLUTIONS, TRANSPOSED
from rankfold.methods import Family, Methods, Moments, Rank, reduction
from rankfold.plan import Plan
from rankfold.progress import Progress, silent
from rankfold.recover import LossFunction, Precision, recover
from rankfold.request import beyond_defaults, request
from rankfold.training.dense import dense_again
from rankfold.unfusing import unfuse

_NO_OVERRIDES = Overrides()
_ROUNDS = "rounds"  # the stage in a journal
_KINDS = (nn.Linear, nn.Embedding, *CONVOLUTIONS, *TRANSPOSED)


@dataclass(frozen=True)
class Round:
    """One L step and the C step after it."""

    stiffness: float  # μ
    loss: float  # of training, the mean of the last epoch, without the pull
    distance: float  # ‖W - Θ‖² of all layers, as it is pulled, after the C step
    ranks: Mapping[str, Rank]  # of the layers that are not dense in Θ


@dataclass(frozen=True)
class LearnedRanks:
    """The factorized network, and how its ranks were found."""

    model: nn.Module
    rounds: tuple[Round, ...]


def learn_ranks(
    model: nn.Module,
    data: Data,
    *,
    params: float | None = None,
    macs: float | None = None,
    memory: float | None = None,
    price: float | None = None,
    cost: str = "macs",
    teacher: nn.Module | None = None,
    distance: Distance = SquaredError(),  # noqa: B008  (frozen)
    loss_fn: LossFunction | None = None,
    rounds: int = 8,
    epochs: int = 1,
    stiffness: float = 1.0,
    growth: float = 2.0,
    multipliers: bool = False,
    layers: str | Sequence[str] = "*",
    methods: Methods | None = ("svd", "separable", "tucker2"),
    loss_metric: str = "weight",
    overrides: Overrides = _NO_OVERRIDES,
    forward: Forward = run,
    learning_rate: float = 3e-4,
    precision: Precision = "float32",
    seed: int = 0,
    journal: Journal | Pathlike | None = None,
    progress: Progress = silent,
) -> LearnedRanks:
    """Train a dense network towards low rank, its ranks chosen anew in every round; factorize it.

    Either a budget (`params`, `macs`, `memory`: see `Analysis.plan`), which every C step keeps
    exactly, or a `price`: the paper's λ, what the whole dense network's `cost` ("params", "macs" or
    "memory") is worth in the unit of the loss. Each of the `rounds` trains the whole weights for so
    many `epochs` with `recover`, on labels (`loss_fn`), towards a `teacher`, or both; the pull's μ
    is `stiffness` first and grows by the factor `growth`; `precision` is that of the forward pass
    in training, as in `recover`. `multipliers` adds those of the augmented
    Lagrangian, which close the gap between W and Θ at a lesser μ, if rounds are long enough for
    the training to follow.

    `loss_metric` is that of `analyze`. In "weight", the paper's, squared errors are shares of the
    squared norm of all weights; in the others they are the losses that they are predicted to cost,
    and a μ of 1 is about as stiff as the loss itself. Linear layers, convolutions and embeddings
    take part; the others stay dense, and so do weights that are shared.

    The model is left as it is. The factorized network remembers its plan, and is trained further
    (`recover`), saved and loaded like any other. What is finished is kept in the directory
    `journal`, from which the same call goes on where it was killed; remove it when the network has
    been saved. Raises BudgetError for a budget out of reach, RankfoldError for settings that make
    no sense or for training that diverges, JournalError for a journal of something else.
    """
    asked = {"params": params, "macs": macs, "memory": memory}
    budgets = {name: value for name, value in asked.items() if value is not None}
    demand = _Demand(budgets, price, cost, overrides)
    for name, count in {"rounds": rounds, "epochs": epochs}.items():
        if type(count) is not int or count < 1:
            raise RankfoldError(f"{name}={count} must be an integer of at least 1")
    if not (stiffness > 0 and growth >= 1):
        raise RankfoldError(
            f"stiffness={stiffness} must be above 0, and growth={growth} at least 1"
        )
    asked_of_analysis: dict[str, Any] = {
        "forward": forward,
        "layers": layers,
        "methods": methods,
        "metric": loss_metric,
        "seed": seed,
    }
    asked_of_recovery: dict[str, Any] = {
        "distance": distance,
        "loss_fn": loss_fn,
        "forward": forward,
        "epochs": epochs,
        "learning_rate": learning_rate,
    }

    def make_request() -> dict[str, dict[str, str]]:
        asked = {"rounds": rounds, "stiffness": stiffness, "growth": growth, "layers": layers}
        asked |= {"methods": methods, "loss_metric": loss_metric, "multipliers": multipliers}
        asked |= {"overrides": overrides, "price": price, "cost": cost, "seed": seed}
        asked |= {"precision": precision}
        about = request(model, {"data": data}, beyond_defaults(learn_ranks, asked | budgets))
        if teacher is not None:
            about["teacher"] = request(teacher, {}, {})["model"]
        return {_ROUNDS: about | request(None, {}, asked_of_recovery)}

    with opened(journal, make_request) as book:
        kept = book.path(f"{_ROUNDS}/analysis")
        analysis = analyze(
            model, data, **asked_of_analysis, check=False, journal=kept, progress=progress
        )
        weights = copy_of(model)
        weights = unfuse(weights, [layer.name for layer in analysis.layers])
        analysis = _prepared(analysis, weights)
        scales = {layer.name: _scale(layer.moments) for layer in analysis.layers}
        validation = list(first_batches(data, 1, device_of(model)))

        def one_round(index: int, at: _State) -> _State:
            """Trains `weights`, and gives a state that holds theirs."""
            mu = stiffness * growth**index
            recovery = recover(
                weights,
                data,
                teacher=teacher,
                penalty=_Pull(mu, scales, _moved(at.targets, at.shifts)),
                # Not those that do best: these are pulled away from.
                keep="last",
                precision=precision,
                validation=validation,
                seed=seed + index * (epochs + 1),
                checkpoint=book.sound(f"{_ROUNDS}/training-{index}.entry"),
                progress=progress,
                **asked_of_recovery,
            )
            loss = recovery.epochs[-1].loss
            if loss is None or recovery.ended != "all epochs done":
                raise RankfoldError(f"round {index + 1}: {recovery.ended}: lower the learning rate")
            step = _compress(analysis, weights, demand, mu, at.shifts)
            shifts = _multipliers(weights, step, at.shifts, growth) if multipliers else {}
            apart = _Pull(1.0, scales, step.targets)(weights).item()
            ranks = {entry.name: entry.rank or () for entry in step.plan.factorized}
            done = Round(mu, loss, apart, ranks)
            return _State(step.plan, step.targets, shifts, weights.state_dict(), done)

        def start() -> _State:
            step = _compress(analysis, weights, demand, stiffness, {})
            return _State(step.plan, step.targets, {}, weights.state_dict(), None)

        unpacked = partial(_State.unpacked, device_of(model))
        at = book.once(f"{_ROUNDS}/start", start, _State.packed, unpacked)
        history: list[Round] = []
        for index in range(rounds):
            make = partial(one_round, index, at)
            at = book.once(f"{_ROUNDS}/{index}", make, _State.packed, unpacked)
            weights.load_state_dict(at.weights)
            history += [at.done] if at.done is not None else []
            book.forget(f"{_ROUNDS}/training-{index}.entry")
        dense = dense_again(weights, like=model)
        small = factorize(dense, at.plan, analysis=analysis, progress=progress)
    return LearnedRanks(small, tuple(history))


@dataclass(frozen=True)
class _Demand:
    """What is asked of the ranks: budgets, or a price of the cost."""

    budgets: Mapping[str, float]
    price: float | None
    cost: str
    overrides: Overrides

    def __post_init__(self) -> None:
        if bool(self.budgets) == (self.price is not None):
            raise BudgetError("ask for a budget (params, macs, memory) or for a price, one of both")
        if self.price is not None and not 0 < self.price < float("inf"):
            raise BudgetError(f"price={self.price} must be above 0")
        if self.cost not in ("params", "macs", "memory"):
            raise BudgetError(f"no cost '{self.cost}' to put a price on: params, macs or memory")

    def plan(self, analysis: Analysis, stiffness: float) -> Plan:
        """The least of the objective of the C step, over all layers, methods and ranks."""
        asked: Any = self.budgets
        if self.price is None:
            return analysis.plan(**asked, overrides=self.overrides)
        dense = {
            "params": analysis.parameters,
            "macs": analysis.macs,
            "memory": analysis.weight_bytes,
        }[self.cost]
        layers, taken = [], {}
        for layer in self.overrides.apply(analysis.layers):
            losses = np.array([0.0, *(candidate.loss for candidate in layer.candidates)])
            objective = self.price / dense * COSTS[self.cost](layer) + stiffness * losses
            if self.overrides.forces(layer):
                objective[0] = np.inf
            chosen = layer.candidates[:0]
            if best := int(objective.argmin()):
                chosen = layer.candidates[best - 1 : best]
                taken[layer.name] = chosen[0].method
            layers.append(replace(layer, candidates=chosen))
        # Only what is chosen is left to be planned.
        settled = replace(analysis, layers=tuple(layers))
        plan = settled.plan(params=1.0, overrides=Overrides(force=taken))
        return replace(plan, request={"price": self.price, "cost": self.cost})


@dataclass(frozen=True)
class _Step:
    """What a C step found."""

    plan: Plan
    targets: Mapping[str, torch.Tensor]  # Θ, of the layers that it factorizes


@dataclass(frozen=True, eq=False)
class _State:
    """Where a run has got to."""

    plan: Plan
    targets: Mapping[str, torch.Tensor]  # Θ
    shifts: Mapping[str, torch.Tensor]  # U
    weights: Mapping[str, torch.Tensor]  # the state of the network
    done: Round | None  # the last

    def packed(self) -> dict[str, Any]:
        return {
            "plan": json.dumps(self.plan.bare().to_json()),
            "targets": self.targets,
            "shifts": self.shifts,
            "weights": self.weights,
            "done": None if self.done is None else asdict(self.done),
        }

    @staticmethod
    def unpacked(device: torch.device, packed: Mapping[str, Any]) -> "_State":
        known = {
            name: {key: tensor.to(device) for key, tensor in packed[name].items()}
            for name in ("targets", "shifts", "weights")
        }
        done = packed["done"]
        plan = Plan.from_json(json.loads(packed["plan"]))
        return _State(plan, **known, done=None if done is None else Round(**done))


@dataclass(frozen=True, eq=False)
class _Pull:
    """μ Σ ‖W - Θ - U‖², a penalty for training."""

    stiffness: float
    scales: Mapping[str, float]  # of each layer's squared error
    aims: Mapping[str, torch.Tensor]  # Θ + U

    def __call__(self, model: nn.Module) -> torch.Tensor:
        total = torch.zeros((), device=device_of(model))
        for name, aim in self.aims.items():
            total = total + self.scales[name] * (_weight(model, name) - aim).square().sum()
        return self.stiffness * total


def _prepared(analysis: Analysis, model: nn.Module) -> Analysis:
    """With the layers that can take part, and errors in one unit for all of them."""
    modules = dict(model.named_modules())

    def takes_part(layer: AnalysedLayer) -> bool:
        return type(modules[layer.name]) in _KINDS and not layer.tied

    able = [layer.name for layer in analysis.layers if takes_part(layer)]
    whole = sum(_weight(model, name).detach().double().square().sum().item() for name in able)

    def metric(layer: AnalysedLayer) -> Moments:
        if analysis.metric == "weight":
            return Moments(scale=1 / whole if whole > 0 else 0.0)
        return layer.moments.to(device_of(model))

    layers = tuple(
        replace(layer, moments=metric(layer))
        if takes_part(layer)
        else replace(layer, candidates=())
        for layer in analysis.layers
    )
    return replace(analysis, layers=layers)


def _scale(moments: Moments) -> float:
    """The mean, over all errors of one size, of what the metric makes of them."""
    scale = 1.0 if moments.scale is None else moments.scale
    for moment in (moments.inputs, moments.gradients):
        if moment is not None:
            diagonal = moment if moment.dim() == 1 else moment.diagonal(dim1=-2, dim2=-1)
            scale *= diagonal.mean().item()
    return scale


def _compress(
    analysis: Analysis,
    model: nn.Module,
    demand: _Demand,
    stiffness: float,
    shifts: Mapping[str, torch.Tensor],
) -> _Step:
    """The C step on the weights as they are."""
    families: dict[tuple[str, str], Family] = {}
    layers = []
    for layer in analysis.layers:
        if layer.candidates:
            module = _shifted(model.get_submodule(layer.name), shifts.get(layer.name))
            for name in dict.fromkeys(candidate.method for candidate in layer.candidates):
                method = layer.methods[name]
                families[layer.name, name] = reduction.fit(method, module, layer.moments)
        losses = (families[layer.name, c.method].loss(c.rank) for c in layer.candidates)
        candidates = (
            replace(one, loss=loss) for one, loss in zip(layer.candidates, losses, strict=True)
        )
        layers.append(replace(layer, candidates=tuple(candidates)))
    analysis = replace(analysis, layers=tuple(layers))
    plan = demand.plan(analysis, stiffness)
    targets = {}
    for entry in plan.factorized:
        form: Any = families[entry.name, str(entry.method)].build(entry.rank or ())
        targets[entry.name] = form.to_dense().weight.detach()
    return _Step(plan, targets)


def _shifted(module: nn.Module, shift: torch.Tensor | None) -> nn.Module:
    """The layer with the weight W - U."""
    if shift is None:
        return module
    moved: Any = copy.deepcopy(module)
    with torch.no_grad():
        moved.weight -= shift
    return moved


def _multipliers(
    model: nn.Module, step: _Step, shifts: Mapping[str, torch.Tensor], growth: float
) -> dict[str, torch.Tensor]:
    """U of the next round: U - (W - Θ), by as much less as μ will be greater."""
    found = {}
    for name, target in step.targets.items():
        gap = target - _weight(model, name).detach()
        found[name] = (shifts.get(name, torch.zeros_like(gap)) + gap) / growth
    return found


def _moved(
    targets: Mapping[str, torch.Tensor], shifts: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Θ + U."""
    return {n: target + shifts[n] if n in shifts else target for n, target in targets.items()}


def _weight(model: nn.Module, name: str) -> torch.Tensor:
    return model.get_submodule(name).get_parameter("weight")
