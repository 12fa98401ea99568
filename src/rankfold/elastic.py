"""One network for many budgets: trained at ranks that change from step to step, sliced when needed.

The factors of a layer are ordered: the first columns of one and the first rows of the next are the
best of that rank. Nothing in training keeps this order by itself; trained with the ranks drawn
anew for every step they keep it (nested dropout: Rippel, Gelbart, Adams: Learning ordered
representations with nested dropout, ICML 2014). The network is then saved once, and `slice_to` cuts
a smaller one out of it, without data and at once.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from rankfold import processes
from rankfold.analysis import Analysis
from rankfold.batches import Data, Forward, run
from rankfold.copies import copy_of
from rankfold.distances import Distance, SquaredError
from rankfold.errors import BudgetError, PlanError, RankError
from rankfold.layers import CONVOLUTIONS, balance_factors
from rankfold.methods import WEIGHT_METRIC, Rank, reduction
from rankfold.plan import LayerPlan, Plan
from rankfold.progress import Progress, silent
from rankfold.record import attach_record, record_of
from rankfold.recover import Recovery, recover
from rankfold.recover.objective import Objective
from rankfold.recover.recover import hold_out
from rankfold.replacement import put_in_place

_STEPS = 3  # budgets that `steps_down_to` names

Budget = Mapping[str, float]  # {"macs": 0.3}: what `Analysis.plan` is asked for


def recover_elastic(
    model: nn.Module,
    analysis: Analysis,
    data: Data,
    *,
    teacher: nn.Module,
    budgets: Sequence[Budget],
    distance: Distance = SquaredError(),  # noqa: B008  (frozen)
    validation: Data | None = None,
    forward: Forward = run,
    seed: int = 0,
    progress: Progress = silent,
    **options: Any,
) -> Recovery:
    """Train a factorized model in place so that it can be sliced to the budgets, and between.

    `analysis` is the one that its plan was made from; each budget is one of `Analysis.plan`, below
    that of the model's own plan. Every step is at the ranks of one of them, the model's own among
    them, drawn at random; the weights kept are those with the least mean loss over all. Layers that
    are no chain of factors keep their ranks. Further options are those of `recover`. The model
    remembers what it can be sliced to, also when it is saved.

    Raises BudgetError for a budget that no plan of these layers and ranks reaches, PlanError for a
    model without a layer that can be sliced or whose plan the analysis does not know.
    """
    record = record_of(model)
    if record.merged or record.removed:
        raise PlanError("layers were merged, or channels taken out: do that to the slices instead")
    own = _own_plan(record.plan)
    choices = restricted(analysis, model)
    plans = [_sliced_plan(record.plan, choices, budget) for budget in budgets]
    ranks = [own, *(_own_plan(plan) for plan in plans)]
    balance_factors(model)
    if validation is None:
        data, validation = hold_out(data)
    objective = Objective(teacher, distance, None, forward)

    with _changing_ranks(model) as layers:

        def set_ranks(chosen: Mapping[str, Rank]) -> None:
            for name, layer in layers.items():
                layer.set_rank(chosen[name])

        def before_step(_: nn.Module, step: int) -> None:
            generator = torch.Generator().manual_seed(processes.seed_of(seed, step))
            set_ranks(ranks[int(torch.randint(len(ranks), (), generator=generator))])

        def score(network: nn.Module, held: Data) -> float:
            losses = []
            for chosen in ranks:
                set_ranks(chosen)
                losses.append(objective.mean(network, held, silent))
            return -sum(losses) / len(losses)

        recovery = recover(
            model,
            data,
            teacher=teacher,
            distance=distance,
            validation=validation,
            metric=None if validation is None else score,
            forward=forward,
            before_step=before_step,
            seed=seed,
            progress=progress,
            **options,
        )
    attach_record(model, replace(record, recovery=recovery, elastic=choices))
    return recovery


def steps_down_to(smallest: float, budget: Budget) -> list[Budget]:
    """Budgets to train at, from one of a model's plan, left out, to a smaller one, evenly by ratio.

    Raises BudgetError unless there is one budget, and the smallest is below it.
    """
    if len(budget) != 1:
        raise BudgetError("an elastic network has one budget: params, macs, memory or latency")
    ((name, greatest),) = budget.items()
    if not 0 < smallest < greatest:
        raise BudgetError(f"elastic={smallest} is not between 0 and {name}={greatest}")
    ratio = smallest / greatest
    return [{name: greatest * ratio ** (step / _STEPS)} for step in range(1, _STEPS + 1)]


def slice_to(model: nn.Module, **budget: float) -> nn.Module:
    """The network within a budget, cut out of one that `recover_elastic` trained; no data needed.

    The budget is that of `Analysis.plan` (`params=`, `macs=`, `memory=`, `latency=`); the original
    is untouched. Raises BudgetError, naming the smallest, for one that cannot be reached; PlanError
    for a model that was not trained for it.
    """
    record = record_of(model)
    if record.elastic is None:
        raise PlanError("this model was not trained to be sliced: see rankfold.recover_elastic")
    if record.merged or record.removed:
        raise PlanError("layers were merged, or channels taken out: slice it before")
    plan = _sliced_plan(record.plan, record.elastic, budget)
    small = copy_of(model)
    made: dict[nn.Module, nn.Module] = {}
    for before, after in zip(record.plan.layers, plan.layers, strict=True):
        if before.rank != after.rank:
            form = small.get_submodule(before.name)
            made[form] = _sliced(form, after)
    small = put_in_place(small, made)
    elastic = _up_to(record.elastic, plan)
    attach_record(small, replace(record, plan=plan, comparison=None, elastic=elastic))
    return small


def restricted(analysis: Analysis, model: nn.Module) -> Analysis:
    """What the layers of a factorized model can be sliced to: their methods, up to their ranks.

    Without moments, which slicing has no use for. Raises PlanError if there is no such layer, or
    the model's plan is of another analysis.
    """
    entries = {entry.name: entry for entry in record_of(model).plan.layers}
    if entries.keys() != {layer.name for layer in analysis.layers}:
        raise PlanError("the analysis is not the one that the model's plan was made from")
    layers, can_be_sliced = [], False
    for layer in analysis.layers:
        entry = entries[layer.name]
        allowed = []
        if entry.rank is not None:
            nested = _is_nested(model.get_submodule(layer.name), entry)
            allowed = [
                one
                for one in layer.candidates
                if one.method == entry.method
                and (_within(one.rank, entry.rank) if nested else one.rank == entry.rank)
            ]
            can_be_sliced |= nested and len(allowed) > 1
        layers.append(replace(layer, candidates=tuple(allowed), moments=WEIGHT_METRIC))
    if not can_be_sliced:
        raise PlanError("no layer of the model is a chain of factors that can be sliced")
    return replace(analysis, layers=tuple(layers), checks=(), trials=())


def _up_to(choices: Analysis, plan: Plan) -> Analysis:
    """What is left to choose from for a slice: it does not grow again."""
    layers = tuple(
        replace(
            layer,
            candidates=tuple(c for c in layer.candidates if _within(c.rank, entry.rank or ())),
        )
        for layer, entry in zip(choices.layers, plan.layers, strict=True)
    )
    return replace(choices, layers=layers)


def _within(rank: Rank, limits: Rank) -> bool:
    return len(rank) == len(limits) and all(map(int.__le__, rank, limits))


def _own_plan(plan: Plan) -> dict[str, Rank]:
    return {entry.name: entry.rank for entry in plan.factorized if entry.rank is not None}


def _sliced_plan(own: Plan, choices: Analysis, budget: Budget) -> Plan:
    """A plan whose layers are those of the model's own, at its ranks or lower ones."""
    asked = choices.plan(**cast(Any, budget))
    # What it would rather leave dense stays as it is: cheaper than that.
    entries = tuple(
        before if after.rank is None else after
        for before, after in zip(own.layers, asked.layers, strict=True)
    )
    for before, after in zip(own.layers, entries, strict=True):
        if after.rank is not None and (
            (before.method, before.layer) != (after.method, after.layer)
            or not _within(after.rank, before.rank or ())
        ):
            raise PlanError(f"layer '{before.name}' cannot be sliced to rank {after.rank}")
    return replace(asked, request=dict(budget)).with_layers(entries).bare()


def _is_nested(form: nn.Module, entry: LayerPlan) -> bool:
    """Whether lower ranks are leading slices of the factors: a chain, of a layer without groups."""
    if not isinstance(form, nn.Sequential) or not hasattr(form, "to_dense") or entry.tied:
        return False
    dense = _dense(form)
    if type(dense) not in (nn.Linear, *CONVOLUTIONS) or getattr(dense, "groups", 1) > 1:
        return False
    if not all(hasattr(factor, "weight") for factor in form):
        return False
    least = tuple(1 for _ in entry.rank or ())
    try:
        shapes = _shapes(form, entry, least)
    except RankError:  # of block terms and rings not all ranks are possible
        return False
    own = form.state_dict()
    return shapes.keys() == own.keys() and all(
        len(shape) == own[name].dim() and all(map(int.__le__, shape, own[name].shape))
        for name, shape in shapes.items()
    )


def _dense(form: nn.Module) -> nn.Module:
    """The dense layer that a form stands for, on the meta device."""
    return cast(Any, copy.deepcopy(form).to("meta")).to_dense()


def _skeleton(form: nn.Module, entry: LayerPlan, rank: Rank) -> nn.Module:
    """What the layer would be at another rank, on the meta device."""
    return reduction.skeleton(entry.make_method(), _dense(form), rank)


def _shapes(form: nn.Module, entry: LayerPlan, rank: Rank) -> dict[str, tuple[int, ...]]:
    skeleton = _skeleton(form, entry, rank)
    return {name: tuple(value.shape) for name, value in skeleton.state_dict().items()}


def _leading(shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(0, length) for length in shape)


def _sliced(form: nn.Module, entry: LayerPlan) -> nn.Module:
    """A form at a lower rank, of the leading slices of its factors, which are copied."""
    assert entry.rank is not None
    skeleton = _skeleton(form, entry, entry.rank)
    device = next(form.parameters()).device
    made = skeleton.to_empty(device=device).train(form.training)
    with torch.no_grad():
        own = dict(form.state_dict())
        for name, value in made.state_dict().items():
            value.copy_(own[name][_leading(value.shape)])
    trained = {name: one.requires_grad for name, one in form.named_parameters()}
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(trained[name])
    return made


class _Masked(nn.Module):
    """A factor with zeros beyond the rank of the moment."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones_like(weight, requires_grad=False))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * cast(torch.Tensor, self.mask)

    def keep(self, shape: Sequence[int]) -> None:
        mask = cast(torch.Tensor, self.mask)
        mask.zero_()
        mask[_leading(shape)] = 1


class _ChangingLayer:
    """The masks of one layer's factors."""

    def __init__(self, form: nn.Module, entry: LayerPlan) -> None:
        self.form, self.entry = form, entry
        self.shapes: dict[Rank, dict[str, tuple[int, ...]]] = {}
        self.plain = copy.deepcopy(form).to("meta")
        self.masks: dict[str, _Masked] = {}
        for name, factor in form.named_children():
            weight = cast(Any, factor).weight
            self.masks[f"{name}.weight"] = _Masked(weight.detach())
            parametrize.register_parametrization(factor, "weight", self.masks[f"{name}.weight"])

    def set_rank(self, rank: Rank) -> None:
        """Until another is set."""
        if rank not in self.shapes:
            self.shapes[rank] = _shapes(self.plain, self.entry, rank)
        for name, mask in self.masks.items():
            mask.keep(self.shapes[rank][name])

    def leave(self) -> None:
        for factor in self.form.children():
            parametrize.remove_parametrizations(factor, "weight", leave_parametrized=False)


@contextmanager
def _changing_ranks(model: nn.Module) -> Iterator[Mapping[str, _ChangingLayer]]:
    """Within: the ranks of the layers that can be sliced can be set; by name."""
    plan = record_of(model).plan
    found: dict[str, _ChangingLayer] = {}
    try:
        for entry in plan.factorized:
            form = model.get_submodule(entry.name)
            if _is_nested(form, entry):
                found[entry.name] = _ChangingLayer(form, entry)
        yield found
    finally:
        for layer in found.values():
            layer.leave()
