"""A model too large for memory, made smaller from disk to disk, one layer at a time.

Its parameters stay in their files. Given data, the network runs once, each module's own parameters
read when it is called and let go after; as it runs, each layer is decomposed in the metric of the
inputs that it was just given (whitened SVD: Wang et al. 2025, SVD-LLM). Without data each is
decomposed by its weight alone. Factors are ordered: they are written once, up to the greatest rank
that pays, and a plan for any budget reads its ranks off them. The new model is written shard by
shard.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from rankfold.analysis import Analysis, Overrides
from rankfold.batches import Data, Forward, batch_size, first_batches, run
from rankfold.card import model_card
from rankfold.checkpoint import (
    check_target,
    plan_document,
    tensors_once,
    write_plan_document,
)
from rankfold.cost import count_parameters
from rankfold.errors import CalibrationError, ModelError
from rankfold.factorize import replace_layers
from rankfold.from_disk.factors import FiledFactors
from rankfold.from_disk.resident import FiledNetwork
from rankfold.journal import FACTORS, Journal
from rankfold.methods import reduction
from rankfold.plan import LayerPlan, Plan
from rankfold.pretrained import is_pretrained, write_files
from rankfold.progress import Progress, silent
from rankfold.record import Record
from rankfold.request import request
from rankfold.shards import INDEX, grouped, shard_name, write_index, write_shard

Pathlike = str | os.PathLike[str]

_HOST = torch.device("cpu")


def compress_from_disk(
    source: Pathlike,
    target: Pathlike,
    *,
    like: Callable[[], nn.Module] | None = None,
    params: float | None = None,
    macs: float | None = None,
    memory: float | None = None,
    data: Data | None = None,
    batches: int = 16,
    forward: Forward = run,
    layers: str | Sequence[str] = "*",
    overrides: Overrides = Overrides(),  # noqa: B008  (frozen)
    alignment: int = 8,
    shard_bytes: int = 2**29,
    force: bool = False,
    progress: Progress = silent,
) -> Plan:
    """Factorize the linear layers of a model in files; what `load` reads is written.

    `source` is a directory with safetensors, in one file or several, and the configuration of a
    model of transformers; without that, `like` makes the model that they are of. The budget is that
    of `Analysis.plan`; MACs are those of the linear layers alone. With `data`, its first `batches`
    batches run through the network as one, and the loss of a layer is the share that its outputs
    lose; embeddings are decomposed by their weight alone. Layers that share a weight, or are called
    several times, stay as they are.

    In memory are at most a layer and its decomposition in float64, or a shard of `shard_bytes`, and
    the activations. What is finished is kept in a hidden directory beside the target: the same call
    goes on where it was interrupted, also with another budget. Raises ModelError for a source that
    cannot be read or run, CheckpointError for a target that cannot be written or files that are
    damaged, BudgetError for a budget that cannot be reached.
    """
    origin, place = Path(source), Path(target).absolute()
    if like is None and not is_pretrained(origin):
        raise ModelError(f"{origin} is of no model of transformers (no config.json): give like=")
    check_target(place, force)
    network = FiledNetwork(origin, like)
    batch = None if data is None else _as_one(list(first_batches(data, batches, _HOST)))
    patterns = [layers] if isinstance(layers, str) else layers
    with Journal(place.with_name(f".{place.name}.unfinished")) as journal:
        journal.begin(lambda: {FACTORS: _request(network, batch, alignment, patterns)})
        factors = FiledFactors(network, journal, alignment, patterns)
        factors.decompose(batch, forward, progress)
        analysis = _analysis(network, factors, batch)
        plan = analysis.plan(params=params, macs=macs, memory=memory, overrides=overrides)
        made = _write_model(network, factors, plan, place.name, shard_bytes, progress)
        if place.exists():
            shutil.rmtree(place)
        made.rename(place)
        journal.remove()
    return plan


def _as_one(batches: Sequence[Any]) -> Any:
    """Batches joined along their first mode."""
    if not batches:
        raise CalibrationError("the data yields no batch")
    first = batches[0]
    try:
        if isinstance(first, torch.Tensor):
            return torch.cat(list(batches))
        if isinstance(first, dict):
            return {name: torch.cat([batch[name] for batch in batches]) for name in first}
    except (RuntimeError, KeyError, TypeError) as error:
        raise CalibrationError(f"the batches cannot be joined into one: {error}") from error
    raise CalibrationError(
        f"batches are tensors or dictionaries of tensors here, not {type(first).__name__}"
    )


def _request(
    network: FiledNetwork, batch: Any, alignment: int, patterns: Sequence[str]
) -> dict[str, str]:
    """What the factors of a network depend on."""
    digest = hashlib.sha256()
    for path in network.shards.files:
        about = path.stat()
        digest.update(f"{path.name} {about.st_size} {about.st_mtime_ns}".encode())
    data = {} if batch is None else {"data": [batch]}
    settings = {"alignment": alignment, "layers": list(patterns)}
    return {**request(None, data, settings), "files": digest.hexdigest()}


def _analysis(network: FiledNetwork, factors: FiledFactors, batch: Any) -> Analysis:
    layers = tuple(factors.layers())
    return Analysis(
        layers,
        count_parameters(network.model),
        sum(one.numel() * one.element_size() for one in network.model.parameters()),
        max(1, sum(layer.macs for layer in layers)),
        1 if batch is None else batch_size(batch),
        "weight" if batch is None else "svd-llm",
    )


def _write_model(
    network: FiledNetwork,
    factors: FiledFactors,
    plan: Plan,
    name: str,
    shard_bytes: int,
    progress: Progress,
) -> Path:
    """The factorized model in a directory of the journal; shards that are there are kept."""
    before = network.sha256()
    record = Record(plan.bare(), before)
    planned = hashlib.sha256(repr((plan.to_json(), shard_bytes, before)).encode()).hexdigest()
    made = cast(Path, factors.journal.path(f"model-{planned[:16]}"))
    made.mkdir(exist_ok=True)
    originals = dict(network.model.named_modules())

    def skeleton(entry: LayerPlan, layer: nn.Module) -> nn.Module:
        return reduction.skeleton(entry.make_method(), layer, entry.rank or ())

    model = replace_layers(network.model, plan, skeleton)
    tensors = dict(tensors_once(model))
    ranks = {entry.name: (entry.rank or (0,))[0] for entry in plan.factorized}
    owners = {own: layer for layer in ranks for own in tensors if own.startswith(f"{layer}.")}
    groups = list(
        grouped({n: one.numel() * one.element_size() for n, one in tensors.items()}, shard_bytes)
    )

    def filled(names: Sequence[str]) -> dict[str, torch.Tensor]:
        forms = {
            layer: factors.form(originals[layer], ranks[layer]).state_dict()
            for layer in {owners[own] for own in names if own in owners}
        }
        return {
            own: forms[owners[own]][own.removeprefix(f"{owners[own]}.")]
            if own in owners
            else network.stored(tensors[own])
            for own in names
        }

    shards = {shard_name(place, len(groups)): names for place, names in enumerate(groups)}
    for file, names in progress(list(shards.items()), "writing"):
        if not (made / file).exists():
            write_shard(filled(names), made / file)
    write_index(made, shards, sum(one.numel() * one.element_size() for one in tensors.values()))
    write_files(model, made, model_card(record, name, network.shards.directory.name))
    write_plan_document(made, plan_document(record), INDEX, list(shards))
    return made
