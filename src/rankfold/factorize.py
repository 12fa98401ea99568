"""Applying a plan to a network: a new network, the original untouched."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from torch import nn

from rankfold.analysis import Analysis
from rankfold.copies import copy_of
from rankfold.errors import ModelError, PlanError, RankError
from rankfold.fingerprint import weights_sha256
from rankfold.journal import FACTORS, Journal, Pathlike, opened
from rankfold.layers import TiedLayers
from rankfold.memory import enough_memory_for
from rankfold.merging import merge_readouts
from rankfold.methods import WEIGHT_METRIC, reduction
from rankfold.plan import LayerPlan, Plan
from rankfold.progress import Progress, silent
from rankfold.record import Record, attach_record
from rankfold.replacement import put_in_place
from rankfold.request import request
from rankfold.unfusing import leave_fast_paths, unfuse

MakeLayer = Callable[[LayerPlan, nn.Module], nn.Module]

_NO_JOURNAL = Journal()


def factorize(
    model: nn.Module,
    plan: Plan,
    *,
    analysis: Analysis | None = None,
    journal: Journal | Pathlike | None = None,
    progress: Progress = silent,
) -> nn.Module:
    """A copy of the model in which every layer that the plan names is factorized.

    In the metric of the plan, whose moments a plan has from the analysis that made it; for a plan
    that was read from a file give the `analysis`. Device, dtype, training mode, `requires_grad` and
    sharing of layers are kept. All new layers are made before the first is put in place, and each
    kept in the directory `journal`, if there is one, from which the same call goes on where it was
    killed. Raises PlanError if the plan is of another network, or its moments are not known,
    DeviceError, naming the layer, where memory does not suffice for one, JournalError for a journal
    of something else or that another process holds.
    """
    known = analysis.moments if analysis is not None else plan.moments
    if plan.metric != "weight" and plan.factorized and not known:
        raise PlanError(
            f"the plan was made in the metric {plan.metric}, whose moments are not in its file: "
            "give factorize the analysis too"
        )

    def fit(entry: LayerPlan, layer: nn.Module) -> nn.Module:
        method = entry.make_method()
        if (reason := reduction.why_not(method, layer)) is not None:
            raise PlanError(f"method '{entry.method}' does not take it: {reason}")
        try:
            moments = known.get(entry.name, WEIGHT_METRIC)
            with enough_memory_for(f"layer '{entry.name}', fitting {entry.method}"):
                return reduction.fit(method, layer, moments).build(entry.rank or ())
        except RankError as error:
            raise PlanError(str(error)) from error
        except ValueError as error:
            raise ModelError(str(error)) from error
        except (RuntimeError, IndexError) as error:
            if analysis is None:
                raise
            raise PlanError(f"the moments of the analysis do not fit it: {error}") from error

    def make_request() -> dict[str, dict[str, str]]:
        moments = [m for one in known.values() for m in (one, one.given) if m is not None]
        tensors = [t for one in moments for t in (one.inputs, one.gradients) if t is not None]
        asked = {"plan": plan.bare().to_json(), "scales": [one.scale for one in moments]}
        return {FACTORS: request(model, {"moments": tensors}, asked)}

    with opened(journal, make_request) as book:
        small = replace_layers(copy_of(model), plan, fit, progress, book)
    attach_record(small, Record(plan.bare(), weights_sha256(model)))
    return small


def _name_of(entry: LayerPlan, metric: str) -> str:
    """What is kept of a layer depends on the model and the analysis, and on this."""
    known = json.dumps([entry.name, entry.method, entry.settings, entry.rank, metric])
    return f"{FACTORS}/{hashlib.sha256(known.encode()).hexdigest()}"


def _packed(form: nn.Module) -> dict[str, Any]:
    trained = [name for name, parameter in form.named_parameters() if parameter.requires_grad]
    return {"state": form.state_dict(), "trained": trained}


def _unpacked(work: tuple[LayerPlan, nn.Module], packed: Mapping[str, Any]) -> nn.Module:
    """A form as it was fitted, to the bit and to the strides."""
    entry, layer = work
    form = reduction.skeleton(entry.make_method(), layer, entry.rank or ())
    form = form.to_empty(device=next(layer.parameters()).device).train(layer.training)
    for name, own in form.state_dict(keep_vars=True).items():
        own.data = packed["state"][name].to(own.device)
    for name, parameter in form.named_parameters():
        parameter.requires_grad_(name in packed["trained"])
    return form


def _layer_of(entry: LayerPlan, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    """What an entry is about: a layer, or several that share a weight; None if there is none."""
    if not entry.tied:
        return modules.get(entry.name)
    found = [modules.get(name) for name in (entry.name, *entry.tied)]
    weights = {id(getattr(layer, "weight", None)) for layer in found}
    if any(layer is None for layer in found) or len(weights) != 1:
        raise PlanError(f"the model does not tie it to {', '.join(entry.tied)}")
    return TiedLayers(cast("list[nn.Module]", found))


def _planned_layer(entry: LayerPlan, modules: Mapping[str, nn.Module]) -> nn.Module:
    with _naming(entry):
        layer = _layer_of(entry, modules)
        if layer is None:
            raise PlanError("the model has no such layer")
        if repr(layer) != entry.layer:
            raise PlanError(f"the model has {layer!r:.200}, the plan is for {entry.layer:.200}")
        return layer


@contextmanager
def _naming(entry: LayerPlan) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(f"while factorizing layer '{entry.name}'")
        raise


def replace_layers(
    model: nn.Module,
    plan: Plan,
    make: MakeLayer,
    progress: Progress = silent,
    journal: Journal = _NO_JOURNAL,
) -> nn.Module:
    """Put `make(entry, layer)` in the place of every layer that the plan factorizes, in `model`.

    A module that several parents share is replaced for all of them. An `nn.MultiheadAttention` of
    which a projection is factorized becomes one of linear layers (`UnfusedAttention`). Readouts are
    then merged into the layers that read them. What is made is kept in the journal. Raises
    PlanError, naming the layer, if there is no such layer or it is not the one that was planned.
    """
    model = unfuse(model, [entry.name for entry in plan.factorized])
    modules = dict(model.named_modules())
    layers = [_planned_layer(entry, modules) for entry in plan.factorized]

    def make_one(work: tuple[LayerPlan, nn.Module]) -> nn.Module:
        with _naming(work[0]):
            return make(*work)

    work = list(zip(plan.factorized, layers, strict=True))
    names = [_name_of(entry, plan.metric) for entry in plan.factorized]
    forms = journal.shared_out(names, work, make_one, progress, "factorizing", _packed, _unpacked)
    made = dict(zip(layers, forms, strict=True))
    readers = {entry.name: entry.reader for entry in plan.factorized if entry.reader is not None}
    model = merge_readouts(put_in_place(model, made), readers)
    leave_fast_paths(model)
    return model
