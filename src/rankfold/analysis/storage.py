"""An analysis written to a directory and read again, to plan from without model or data.

    analysis.json          layers, costs, checks, trials, timings
    analysis.safetensors   candidates, spectra and moments

Nothing is unpickled; what a file says is checked before it is believed.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rankfold.analysis.candidates import AnalysedLayer, Candidate
from rankfold.analysis.correction import Check
from rankfold.analysis.latency import LayerTiming, NetworkTiming
from rankfold.documents import read, read_json
from rankfold.errors import CheckpointError, PlanError
from rankfold.files import replace_file
from rankfold.methods import METHODS, Moments, Spectrum

if TYPE_CHECKING:
    from rankfold.analysis.analysis import Analysis

FORMAT_VERSION = 1
_MOST = 1e100  # of a moment: products of several stay finite
DOCUMENT, TENSORS = "analysis.json", "analysis.safetensors"

Pathlike = str | os.PathLike[str]


def save_analysis(analysis: "Analysis", directory: Pathlike) -> None:
    """Write an analysis; raises CheckpointError for a directory that cannot be written."""
    target = Path(directory)
    document, tensors = to_document(analysis)
    try:
        target.mkdir(parents=True, exist_ok=True)
        replace_file(target / TENSORS, lambda path: save_file(tensors, path))
        text = json.dumps(document, indent=1)
        replace_file(target / DOCUMENT, lambda path: path.write_text(text, encoding="utf-8"))
    except (OSError, SafetensorError) as error:  # a full disk is either
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{target} cannot be written: {reason}") from error


def load_analysis(directory: Pathlike) -> "Analysis":
    """Read an analysis; raises CheckpointError for one that is missing, damaged or foreign."""
    source = Path(directory)
    try:
        document = read_json(source / DOCUMENT)
        tensors = read_tensors(source / TENSORS)
    except (OSError, PlanError, CheckpointError) as error:
        raise CheckpointError(f"{source} holds no analysis: {error}") from error
    try:
        return from_document(document, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file; raises CheckpointError for any other."""
    if not path.is_file():
        raise CheckpointError(f"{path} is no file")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def pack_analysis(analysis: "Analysis") -> tuple[str, dict[str, torch.Tensor]]:
    """An analysis for a journal."""
    document, tensors = to_document(analysis)
    return json.dumps(document), tensors


def unpack_analysis(packed: tuple[str, Mapping[str, torch.Tensor]]) -> "Analysis":
    """What `pack_analysis` made; raises CheckpointError for anything else."""
    text, tensors = packed
    return from_document(json.loads(text), tensors)


def pack_layer(layer: AnalysedLayer) -> tuple[str, dict[str, torch.Tensor]]:
    """One layer of an analysis for a journal."""
    tensors: dict[str, torch.Tensor] = {}
    return json.dumps(_to_json(0, layer, tensors)), tensors


def unpack_layer(packed: tuple[str, Mapping[str, torch.Tensor]]) -> AnalysedLayer:
    """What `pack_layer` made."""
    text, tensors = packed
    return _from_json(0, json.loads(text), tensors)


def to_document(analysis: "Analysis") -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """An analysis as JSON primitives and tensors."""
    tensors: dict[str, torch.Tensor] = {}
    document = {
        "format_version": FORMAT_VERSION,
        "layers": [_to_json(i, layer, tensors) for i, layer in enumerate(analysis.layers)],
        "parameters": analysis.parameters,
        "weight_bytes": analysis.weight_bytes,
        "macs": analysis.macs,
        "batch_size": analysis.batch_size,
        "metric": analysis.metric,
        "checks": [asdict(check) for check in analysis.checks],
        "trials": [asdict(trial) for trial in analysis.trials],
        "timing": None if analysis.timing is None else asdict(analysis.timing),
    }
    return document, tensors


def from_document(document: Any, tensors: Mapping[str, torch.Tensor]) -> "Analysis":
    """What `to_document` made; raises CheckpointError for anything else."""
    from rankfold.analysis.analysis import Analysis, Trial

    try:
        if document["format_version"] != FORMAT_VERSION:
            raise CheckpointError(
                f"format version {document['format_version']!r:.40}, this rankfold reads "
                f"{FORMAT_VERSION}"
            )
        timing = document["timing"]
        analysis = Analysis(
            tuple(_from_json(i, entry, tensors) for i, entry in enumerate(document["layers"])),
            parameters=_count(document, "parameters"),
            weight_bytes=_count(document, "weight_bytes"),
            macs=_count(document, "macs"),
            batch_size=_count(document, "batch_size", least=1),
            metric=document["metric"],
            checks=tuple(read(Check, check, "check") for check in document["checks"]),
            trials=tuple(read(Trial, trial, "trial") for trial in document["trials"]),
            timing=None if timing is None else read(NetworkTiming, timing, "timing"),
        )
        names = {layer.name for layer in analysis.layers}
        _require(len(names) == len(analysis.layers), "two layers of one name")
        _require(isinstance(analysis.metric, str), f"metric {analysis.metric!r:.40}")
        _require(all(check.layer in names for check in analysis.checks), "a check of no layer")
        _require(timing is None or _are_times(document["timing"]), f"timing {timing!r:.80}")
    except (
        *(KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError),
        *(OverflowError, PlanError),
    ) as error:
        raise CheckpointError(f"the analysis is damaged: {error!r:.300}") from error
    return analysis


def _are_times(timing: Mapping[str, Any]) -> bool:
    return all(0 <= timing[name] < math.inf for name in ("dense_ms", "rest_ms"))


def _to_json(index: int, layer: AnalysedLayer, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    scales = _put_moments(f"{index}", layer.moments, tensors)
    for method in layer.methods:
        found = [candidate for candidate in layer.candidates if candidate.method == method]
        if found:
            key = f"{index}.{method}"
            tensors[f"{key}.ranks"] = torch.tensor([candidate.rank for candidate in found])
            tensors[f"{key}.losses"] = torch.tensor([c.loss for c in found], dtype=torch.float64)
            tensors[f"{key}.costs"] = torch.tensor([(c.parameters, c.macs) for c in found])
        for place, spectrum in enumerate(layer.spectra[method]):
            values = spectrum.singular_values.cpu().clone()
            tensors[f"{index}.{method}.spectrum.{place}"] = values
    timing = layer.timing
    return {
        "name": layer.name,
        "layer": layer.layer,
        "parameters": layer.parameters,
        "macs": layer.macs,
        "reason": layer.reason,
        "reader": layer.reader,
        "tied": layer.tied,
        "element_size": layer.element_size,
        **scales,
        "methods": {
            name: {
                "settings": asdict(method),
                "grid": layer.grids[name],
                "shapes": [spectrum.shape for spectrum in layer.spectra[name]],
            }
            for name, method in layer.methods.items()
        },
        "timing": None
        if timing is None
        else {
            "dense_ms": timing.dense_ms,
            "grids": timing.grids,
            "tables": {name: table.tolist() for name, table in timing.tables.items()},
        },
    }


@dataclass(frozen=True)
class _Layer:
    """What is said of a layer beside its methods and times."""

    name: str
    layer: str
    reason: str | None
    scale: float | None
    given_scale: float | None = None
    reader: str | None = None
    tied: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Fitted:
    """What is said of a method that was fitted, beside its settings."""

    grid: tuple[tuple[int, ...], ...]
    shapes: tuple[tuple[int, int], ...]


def _from_json(
    index: int, entry: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> AnalysedLayer:
    flat = _Layer.__dataclass_fields__.keys()
    about = read(_Layer, {name: one for name, one in entry.items() if name in flat}, "layer")
    methods, spectra, grids, candidates = {}, {}, {}, []
    for name, settings in entry["methods"].items():
        methods[name] = METHODS[name](**settings["settings"])
        fitted = {key: one for key, one in settings.items() if key != "settings"}
        found = read(_Fitted, fitted, f"{about.name}: {name}")
        _require(_ascend(found.grid), f"ranks {found.grid!r:.80}")
        grids[name] = found.grid
        key = f"{index}.{name}"
        spectra[name] = tuple(
            _spectrum(tensors[f"{key}.spectrum.{place}"], shape)
            for place, shape in enumerate(found.shapes)
        )
        _require(len(spectra[name]) in (0, len(found.grid)), "spectra of other ranks")
        if f"{key}.ranks" in tensors:
            candidates += _candidates(name, key, len(found.grid), tensors)
    timing = None if entry["timing"] is None else _timing(entry["timing"])
    if timing is not None:
        for one in candidates:
            _require(len(timing.grids[one.method]) == len(one.rank), "times of other ranks")
    return AnalysedLayer(
        about.name,
        about.layer,
        _count(entry, "parameters"),
        _count(entry, "macs"),
        about.reason,
        methods,
        spectra,
        tuple(candidates),
        grids,
        _moments(f"{index}", entry, tensors),
        _count(entry, "element_size", least=1),
        timing,
        about.reader,
        about.tied,
    )


def _candidates(
    method: str, key: str, entries: int, tensors: Mapping[str, torch.Tensor]
) -> list[Candidate]:
    ranks, losses, costs = (tensors[f"{key}.{part}"] for part in ("ranks", "losses", "costs"))
    _require(not (ranks.is_floating_point() or costs.is_floating_point()), "ranks of no integers")
    _require(ranks.shape == (len(ranks), entries) and bool((ranks >= 1).all()), f"ranks of {key}")
    _require(costs.shape == (len(ranks), 2) and bool((costs >= 0).all()), f"costs of {key}")
    finite = losses.is_floating_point() and bool((losses.isfinite() & (losses >= 0)).all())
    _require(losses.shape == (len(ranks),) and finite, f"losses of {key}")
    return [
        Candidate(method, tuple(rank), loss, parameters, macs)
        for rank, loss, (parameters, macs) in zip(
            ranks.tolist(), losses.tolist(), costs.tolist(), strict=True
        )
    ]


def _spectrum(values: torch.Tensor, shape: tuple[int, int]) -> Spectrum:
    real = values.is_floating_point() and bool((values.isfinite() & (values >= 0)).all())
    fits = values.dim() == 1 and len(values) == min(shape) >= 1
    _require(real and fits, f"a spectrum of {tuple(values.shape)!r:.40} for {shape!r:.60}")
    return Spectrum(values, shape)


def _timing(entry: Mapping[str, Any]) -> LayerTiming:
    tables = {name: np.array(table, dtype=float) for name, table in entry["tables"].items()}
    without = {name: one for name, one in entry.items() if name != "tables"}
    found = read(LayerTiming, {**without, "tables": {}}, "timing of a layer")
    _require(0 <= found.dense_ms < math.inf, f"a time of {found.dense_ms}")
    _require(found.grids.keys() == tables.keys(), "times of other methods")
    for name, grid in found.grids.items():
        _require(_ascend(grid), f"times at ranks {grid!r:.80}")
        table = tables[name]
        _require(table.shape == tuple(map(len, grid)), "times of other ranks")
        _require(bool((np.isfinite(table) & (table >= 0)).all()), "times that are none")
    return LayerTiming(found.dense_ms, found.grids, tables)


def _ascend(grid: Sequence[Sequence[int]]) -> bool:
    """Whether each entry of a rank has values, positive and ascending."""
    return len(grid) > 0 and all(
        len(entry) > 0 and entry[0] >= 1 and all(a < b for a, b in pairwise(entry))
        for entry in grid
    )


def _put_moments(
    key: str, moments: Moments, tensors: dict[str, torch.Tensor]
) -> dict[str, float | None]:
    """Add the moments to the tensors; the scales are what is left to write."""
    for name, moment in (("inputs", moments.inputs), ("gradients", moments.gradients)):
        if moment is not None:
            tensors[f"{key}.{name}"] = moment.cpu().contiguous()
    if moments.given is None:
        return {"scale": moments.scale}
    given = _put_moments(f"{key}.given", moments.given, tensors)
    return {"scale": moments.scale, "given_scale": given["scale"]}


def _moments(
    key: str, entry: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], prefix: str = ""
) -> Moments:
    scale = entry[f"{prefix}scale"]
    given = None
    if not prefix and "given_scale" in entry:
        given = _moments(f"{key}.given", entry, tensors, "given_")
    _require(scale is None or 0 <= scale < math.inf, f"a scale of {scale!r:.40}")
    return Moments(
        _moment(tensors.get(f"{key}.inputs")),
        _moment(tensors.get(f"{key}.gradients")),
        None if scale is None else float(scale),
        given,
    )


def _moment(found: torch.Tensor | None) -> torch.Tensor | None:
    if found is not None:
        square = found.dim() == 1 or (found.dim() in (2, 3) and found.shape[-1] == found.shape[-2])
        real = found.dtype == torch.float64 and bool((found.abs() < _MOST).all())
        _require(square and found.numel() > 0 and real, f"a moment of {tuple(found.shape)}")
    return found


def _count(document: Mapping[str, Any], key: str, least: int = 0) -> int:
    value = document[key]
    _require(type(value) is int and value >= least, f"{key} is {value!r:.40}")
    return value


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)
