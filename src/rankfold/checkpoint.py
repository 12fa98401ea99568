"""Saving and loading a factorized network: safetensors and JSON, never a pickle.

A saved model is a directory:

    model.safetensors   the weights
    plan.json           what was done to which layer, what it cost and brought, and the SHA-256 of
                        the weights file that it belongs to

or, of a model that was too large for memory, several files and their index in the place of
model.safetensors; and for a model of transformers its config.json, generation_config.json,
tokenizer files, so that it can be loaded without anything else, and a card (README.md).

Saving is atomic. A new directory is written beside its place and renamed into it. Over an old one,
the new weights are written under the name model.safetensors.new, plan.json is replaced by a rename,
which is the moment the new model takes effect, and then the weights get their proper name. A kill
at any point leaves a plan.json whose weights are there under one of the two names.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from rankfold import processes
from rankfold.analysis import Analysis
from rankfold.analysis.storage import from_document, read_tensors, to_document
from rankfold.card import model_card
from rankfold.copies import copy_of
from rankfold.documents import read, read_json
from rankfold.errors import CheckpointError, ModelError, PlanError, RankError
from rankfold.factorize import replace_layers
from rankfold.files import replace_file
from rankfold.layers import StructuredLinear
from rankfold.measure import Comparison
from rankfold.merging import Pair, merge_pairs
from rankfold.methods import reduction
from rankfold.narrowing import Removal, narrow
from rankfold.outlook import Outlook
from rankfold.plan import LayerPlan, Plan
from rankfold.pretrained import empty_pretrained, is_pretrained, write_files
from rankfold.record import Record, attach_record, record_of
from rankfold.recover import Recovery
from rankfold.shards import INDEX, SHARD, Shards
from rankfold.version import __version__

Pathlike = str | os.PathLike[str]

WEIGHTS = "model.safetensors"
INCOMING = "model.safetensors.new"
PLAN = "plan.json"

_INTEGRAL = {"ranks": torch.int64, "costs": torch.int64}  # of what an analysis has of candidates


def save(
    model: nn.Module,
    directory: Pathlike,
    *,
    force: bool = False,
    origin: Mapping[str, str] | None = None,
) -> None:
    """Write a network made by `factorize` to a directory that `load` reads.

    `origin` (import paths of the model and data, for `rankfold evaluate`) is written into plan.json
    beside all that the model remembers of its making. An existing saved model is replaced only with
    `force`; a directory that is none is never touched. A model of transformers has its
    configuration and tokenizer saved beside. Of several processes the first writes. Raises
    CheckpointError if it cannot be written, PlanError for a model that rankfold did not make.
    """
    if not processes.is_first():
        return
    record = record_of(model)
    target = Path(directory)
    check_target(target, force)
    tensors = dict(tensors_once(model))
    document = plan_document(
        record,
        strides=_unusual_strides(tensors),
        by_weight=[name for name, layer in _structured(model) if layer.uses_weight],
        origin=origin,
    )
    base = Path(str(getattr(model, "name_or_path", "") or "")).name
    card = model_card(record, target.name, base or None)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            write_files(model, target, card)
            _write(target, INCOMING, tensors, document)
            (target / INCOMING).replace(target / WEIGHTS)
        else:
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as room:
                beside = Path(room) / "new"
                beside.mkdir()
                write_files(model, beside, card)
                _write(beside, WEIGHTS, tensors, document)
                beside.rename(target)
    except (OSError, SafetensorError) as error:  # a full disk is either
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{target} cannot be written: {reason}") from error


def plan_document(
    record: Record,
    *,
    strides: Mapping[str, list[int]] | None = None,
    by_weight: Sequence[str] = (),
    origin: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What plan.json holds, but for the digest of the weights."""
    return {
        "rankfold": __version__,
        "torch": torch.__version__,
        "plan": record.plan.to_json(),
        "source_sha256": record.source_sha256,
        "strides": dict(strides or {}),
        "recovery": None if record.recovery is None else asdict(record.recovery),
        "comparison": None if record.comparison is None else asdict(record.comparison),
        "outlook": None if record.outlook is None else record.outlook.to_json(),
        "merged": record.merged,
        "removed": [removal.to_json() for removal in record.removed],
        "elastic": None if record.elastic is None else _elastic_to_json(record.elastic),
        "by_weight": list(by_weight),
        "origin": dict(origin or {}),
    }


def write_plan_document(
    directory: Path, document: Mapping[str, Any], weights: str, shards: Sequence[str] = ()
) -> None:
    """Write plan.json at once, with the digest of a file of weights, or of an index and shards."""
    whole = {**document, "weights_sha256": _file_sha256(directory / weights)}
    if shards:
        whole["shards"] = {name: _file_sha256(directory / name) for name in shards}

    def write(path: Path) -> None:
        path.write_text(json.dumps(whole, indent=1), encoding="utf-8")
        _flush(path)
        for name in (weights, *shards):
            (directory / name).chmod(path.stat().st_mode)  # safetensors makes it private

    replace_file(directory / PLAN, write)


def load(
    directory: Pathlike,
    like: Callable[[], nn.Module] | nn.Module | None = None,
    *,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Read a network that `save` wrote, in eval mode; its outputs are the saved one's, to the bit.

    `like` is the factory of the dense network, or such a network (which is copied); its weights do
    not matter, its architecture and dtypes do. A model of transformers needs none: it is built from
    the config.json beside. `device` defaults to where the factory puts it.
    Raises CheckpointError, saying what is wrong, for a directory that is missing, damaged, or of
    another network; ModelError if the factory fails.
    """
    source = Path(directory)
    document = read_plan_document(source)
    plan = _plan_of(document, source)
    tensors = _read_tensors(source, document)
    if like is None and not is_pretrained(source):
        raise CheckpointError(f"{source} does not say what network it is of: give like=")
    model = empty_pretrained(source) if like is None else _build(like)
    if device is not None and like is not None:
        model.to(device)  # a model on the meta device goes there once it is filled

    def skeleton(entry: LayerPlan, layer: nn.Module) -> nn.Module:
        method = entry.make_method()
        if (reason := reduction.why_not(method, layer)) is not None:
            raise PlanError(f"method '{entry.method}' does not take it: {reason}")
        weight = next(layer.parameters())
        form = reduction.skeleton(method, layer, entry.rank or ())
        form = form.to_empty(device=weight.device)
        return form if weight.requires_grad else form.requires_grad_(False)

    merged, removed = _pairs_of(document, source), _removals_of(document, source)
    try:
        model = _merge_and_narrow(replace_layers(model, plan, skeleton), merged, removed)
    except (PlanError, RankError) as error:
        raise CheckpointError(f"{source} is of another network: {error}") from error
    _fill(model, tensors, document["strides"], source)
    if device is not None and like is None:
        model.to(device)
    by_weight = document.get("by_weight", [])
    for name, layer in _structured(model):
        layer.use_weight(isinstance(by_weight, list) and name in by_weight)
    elastic = _elastic_from_json(document, plan, source)
    record = Record(
        plan, document["source_sha256"], elastic=elastic, merged=merged, removed=removed
    )
    attach_record(model, replace(record, **_history_of(document, source)))
    return model.eval()


def read_record(directory: Pathlike) -> Record:
    """What a saved model remembers of its making, without the model.

    Raises CheckpointError for a directory that holds none, or a damaged one.
    """
    source = Path(directory)
    document = read_plan_document(source)
    plan = _plan_of(document, source)
    return Record(plan, document["source_sha256"], **_history_of(document, source))


def check_target(directory: Pathlike, force: bool) -> None:
    """Raise CheckpointError unless `save` may write to the directory; touches nothing."""
    target = Path(directory)
    if target.exists():
        if not target.is_dir():
            raise CheckpointError(f"{target} exists and is not a directory")
        if any(target.iterdir()) and not (target / PLAN).is_file():
            raise CheckpointError(
                f"{target} exists and is no saved model: choose another directory"
            )
        if not force:
            raise CheckpointError(f"{target} exists: pass --force (force=True) to replace it")
    place = next(path for path in (target, *target.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise CheckpointError(f"{target} cannot be written: {place} is not a writable directory")


def read_plan_document(directory: Pathlike) -> dict[str, Any]:
    """plan.json of a saved model, checked for its outer form; raises CheckpointError."""
    path = Path(directory) / PLAN
    if not Path(directory).is_dir():
        raise CheckpointError(f"{directory} is not a directory")
    try:
        document = read_json(path)
    except FileNotFoundError:
        raise CheckpointError(f"{directory} is no saved model: it has no {PLAN}") from None
    except (OSError, PlanError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    for key, kind in {
        "plan": dict,
        "source_sha256": str,
        "weights_sha256": str,
        "strides": dict,
        "origin": dict,
    }.items():
        if not isinstance(document, dict) or not isinstance(document.get(key), kind):
            raise CheckpointError(f"{path} is damaged or not of rankfold: '{key}' is missing")
    if not all(isinstance(name, str) for name in document["origin"].values()):
        raise CheckpointError(f"{path} is damaged: 'origin' is {document['origin']!r:.80}")
    return document


def _structured(model: nn.Module) -> Iterator[tuple[str, StructuredLinear]]:
    for name, layer in model.named_modules():
        if isinstance(layer, StructuredLinear):
            yield name, layer


def _elastic_to_json(analysis: Analysis) -> dict[str, Any]:
    """What a network can be sliced to; a few numbers for each layer and rank."""
    document, tensors = to_document(analysis)
    return {**document, "tensors": {name: tensor.tolist() for name, tensor in tensors.items()}}


def _elastic_from_json(document: Mapping[str, Any], plan: Plan, source: Path) -> Analysis | None:
    found = document.get("elastic")
    if found is None:
        return None
    try:
        tensors = {
            name: torch.tensor(value, dtype=_INTEGRAL.get(name.rpartition(".")[2], torch.float64))
            for name, value in found["tensors"].items()
        }
        analysis = from_document(found, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{source / PLAN}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{source / PLAN} is damaged: 'elastic': {error!r:.200}") from error
    if [layer.name for layer in analysis.layers] != [layer.name for layer in plan.layers]:
        raise CheckpointError(f"{source / PLAN} is damaged: 'elastic' is of other layers")
    return analysis


def _plan_of(document: Mapping[str, Any], source: Path) -> Plan:
    try:
        return Plan.from_json(document["plan"])
    except PlanError as error:
        raise CheckpointError(f"{source / PLAN}: {error}") from error


def _history_of(document: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """How a network was recovered and compared, and the plans that there were to choose from."""
    kinds = {"recovery": Recovery, "comparison": Comparison}
    found = {name: document.get(name) for name in (*kinds, "outlook")}
    try:
        history: dict[str, Any] = {
            name: read(kind, found[name], name)
            for name, kind in kinds.items()
            if found[name] is not None
        }
        if found["outlook"] is not None:
            history["outlook"] = Outlook.from_json(found["outlook"])
    except PlanError as error:
        raise CheckpointError(f"{source / PLAN} is damaged: {error}") from error
    return history


def _pairs_of(document: Mapping[str, Any], source: Path) -> tuple[Pair, ...]:
    """The names of the modules that were merged; none in files from before there were any."""
    pairs = document.get("merged", [])
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and list(map(type, pair)) == [str, str] for pair in pairs
    ):
        raise CheckpointError(f"{source / PLAN} is damaged: 'merged' is {pairs!r:.80}")
    return tuple((first, second) for first, second in pairs)


def _removals_of(document: Mapping[str, Any], source: Path) -> tuple[Removal, ...]:
    """What was taken out; nothing in files from before that could be."""
    found = document.get("removed", [])
    if not isinstance(found, list):
        raise CheckpointError(f"{source / PLAN} is damaged: 'removed' is {found!r:.80}")
    try:
        return tuple(map(Removal.from_json, found))
    except PlanError as error:
        raise CheckpointError(f"{source / PLAN} is damaged: {error}") from error


def _merge_and_narrow(
    model: nn.Module, merged: Sequence[Pair], removed: Sequence[Removal]
) -> nn.Module:
    """Modules made one and channels taken out, in the order in which it was done."""
    done = 0
    for removal in removed:
        if not done <= removal.merged_before <= len(merged):
            raise PlanError(f"nothing was taken out after {removal.merged_before} merged pairs")
        model = merge_pairs(model, merged[done : removal.merged_before])
        model, done = narrow(model, removal), removal.merged_before
    return merge_pairs(model, merged[done:])


def _write(
    directory: Path, weights: str, tensors: dict[str, torch.Tensor], document: dict[str, Any]
) -> None:
    """Write weights under the name given, then plan.json by a rename; both reach the disk."""
    (directory / weights).unlink(missing_ok=True)  # a link would have another file written
    save_file(
        {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()},
        directory / weights,
    )
    _flush(directory / weights)
    write_plan_document(directory, document, weights)


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_once(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The state dict, each shared tensor under its first name alone."""
    seen = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"the state '{name}' is no tensor, and nothing is pickled: let it be one, "
                "or quantize after loading"
            )
        if id(value) not in seen:
            seen.add(id(value))
            yield name, value


def _unusual_strides(tensors: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    """Strides of the tensors not stored row-major: they decide which kernels run."""
    return {
        name: list(tensor.stride())
        for name, tensor in tensors.items()
        if tensor.stride() != torch.empty(tensor.shape, device="meta").stride()
        and sorted(tensor.stride()) == sorted(_dense_strides(tensor))
    }


def _dense_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """The strides of a gapless copy that keeps the order of the modes."""
    return torch.empty_like(tensor, device="meta", memory_format=torch.preserve_format).stride()


def _read_tensors(source: Path, document: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights that belong to the plan document, under whichever name a save left them."""
    if "shards" in document:
        return _read_shards(source, document)
    found = [source / name for name in (WEIGHTS, INCOMING) if (source / name).is_file()]
    if not found:
        raise CheckpointError(f"{source} is no saved model: it has no {WEIGHTS}")
    for path in found:
        if _file_sha256(path) == document["weights_sha256"]:
            return read_tensors(path)
    raise CheckpointError(
        f"{found[0]} is damaged or does not belong to {PLAN}: its SHA-256 is another"
    )


def _read_shards(source: Path, document: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of several files, each backed by its file."""
    digests = {INDEX: document["weights_sha256"], **_digests_of_shards(document, source)}
    for name, digest in digests.items():
        if not (source / name).is_file():
            raise CheckpointError(f"{source} is damaged: it has no {name}")
        if _file_sha256(source / name) != digest:
            raise CheckpointError(f"{source / name} is damaged: its SHA-256 is another")
    shards = Shards.of(source)
    if unknown := {path.name for path in shards.files} - digests.keys():
        raise CheckpointError(f"{source / INDEX} names {min(unknown)}, of which {PLAN} knows not")
    return {name: shards.tensor(name) for name in shards.file_of}


def _digests_of_shards(document: Mapping[str, Any], source: Path) -> dict[str, str]:
    found = document["shards"]
    if not isinstance(found, dict) or not all(
        SHARD.fullmatch(name) and isinstance(digest, str) for name, digest in found.items()
    ):
        raise CheckpointError(f"{source / PLAN} is damaged: 'shards' is {found!r:.80}")
    return found


def _build(like: Callable[[], nn.Module] | nn.Module) -> nn.Module:
    if isinstance(like, nn.Module):
        return copy_of(like)
    try:
        model = like()
    except Exception as error:
        raise ModelError(f"the model factory failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"the model factory gave a {type(model).__name__}, not an nn.Module")
    return model


def _fill(
    model: nn.Module, tensors: dict[str, torch.Tensor], strides: Mapping[str, Any], source: Path
) -> None:
    """Copy the tensors into the model's; CheckpointError, naming them, for any that differ."""
    expected = dict(tensors_once(model))
    for what, names in (
        ("lacks", expected.keys() - tensors.keys()),
        ("has, unknown to the network,", tensors.keys() - expected.keys()),
    ):
        if names:
            first = sorted(names)[0]
            raise CheckpointError(f"{source / WEIGHTS} {what} '{first}' ({len(names)} in all)")
    for name, tensor in tensors.items():
        own = expected[name]
        for what, theirs, ours in (
            ("shape", tuple(tensor.shape), tuple(own.shape)),
            ("dtype", tensor.dtype, own.dtype),
        ):
            if theirs != ours:
                raise CheckpointError(
                    f"{source / WEIGHTS}: '{name}' has {what} {theirs}, the network's has {ours}"
                )
    for name in strides.keys() - tensors.keys():
        raise CheckpointError(f"{source / PLAN}: strides of '{name}', which is no tensor")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own = expected[name]
            if name in strides:
                own.data = _with_strides(
                    own, strides[name], f"{source / PLAN}: strides of '{name}'"
                )
            if own.is_meta:
                filled = torch.empty_like(own, device="cpu").copy_(tensor)
                torch.utils.swap_tensors(own, nn.Parameter(filled, own.requires_grad))
            else:
                own.copy_(tensor)


def _with_strides(tensor: torch.Tensor, strides: Any, where: str) -> torch.Tensor:
    """An empty tensor like the one given, stored with the strides given, which must be gapless."""
    if (
        not isinstance(strides, list)
        or len(strides) != tensor.dim()
        or not all(type(stride) is int and 0 < stride <= tensor.numel() for stride in strides)
    ):
        raise CheckpointError(f"{where} are {strides!r:.80}")
    gapless = 1
    for stride, length in sorted(zip(strides, tensor.shape, strict=True)):
        if length > 1 and stride != gapless:
            raise CheckpointError(
                f"{where} are {strides}, which does not fit {tuple(tensor.shape)}"
            )
        gapless *= length
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
