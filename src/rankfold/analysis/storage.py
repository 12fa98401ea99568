"""An analysis written to a directory and read again, to plan from without model or data.

    analysis.json          layers, costs, checks, trials, timings
    analysis.safetensors   candidates, spectra and moments

Nothing is unpickled; what a file says is checked before it is believed.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rankfold.analysis.candidates import AnalysedLayer, Candidate
from rankfold.analysis.correction import Check
from rankfold.analysis.latency import LayerTiming, NetworkTiming
from rankfold.errors import CheckpointError
from rankfold.methods import METHODS, Moments, Spectrum

if TYPE_CHECKING:
    from rankfold.analysis.analysis import Analysis

FORMAT_VERSION = 1
DOCUMENT, TENSORS = "analysis.json", "analysis.safetensors"

Pathlike = str | os.PathLike[str]


def save_analysis(analysis: "Analysis", directory: Pathlike) -> None:
    """Write an analysis; raises CheckpointError for a directory that cannot be written."""
    target = Path(directory)
    document, tensors = to_document(analysis)
    try:
        target.mkdir(parents=True, exist_ok=True)
        _replace(target / TENSORS, lambda path: save_file(tensors, path))
        _replace(target / DOCUMENT, lambda path: path.write_text(json.dumps(document, indent=1)))
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror or error}") from error


def load_analysis(directory: Pathlike) -> "Analysis":
    """Read an analysis; raises CheckpointError for one that is missing, damaged or foreign."""
    source = Path(directory)
    try:
        document = json.loads((source / DOCUMENT).read_text(encoding="utf-8"))
        tensors = load_file(source / TENSORS)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, SafetensorError) as error:
        raise CheckpointError(f"{source} holds no analysis: {error}") from error
    try:
        return from_document(document, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error


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
                f"format version {document['format_version']}, this rankfold reads {FORMAT_VERSION}"
            )
        timing = document["timing"]
        return Analysis(
            tuple(_from_json(i, entry, tensors) for i, entry in enumerate(document["layers"])),
            parameters=_count(document, "parameters"),
            weight_bytes=_count(document, "weight_bytes"),
            macs=_count(document, "macs"),
            batch_size=_count(document, "batch_size"),
            metric=str(document["metric"]),
            checks=tuple(
                Check(**{**check, "rank": tuple(check["rank"])}) for check in document["checks"]
            ),
            trials=tuple(Trial(**trial) for trial in document["trials"]),
            timing=None if timing is None else NetworkTiming(**timing),
        )
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"the analysis is damaged: {error!r}") from error


def _replace(path: Path, write: Any) -> None:
    """Write beside the file, then rename: it is never half there."""
    beside = path.with_name(path.name + ".new")
    write(beside)
    beside.replace(path)


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


def _from_json(
    index: int, entry: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> AnalysedLayer:
    methods, spectra, grids, candidates = {}, {}, {}, []
    for name, about in entry["methods"].items():
        methods[name] = METHODS[name](**about["settings"])
        grids[name] = tuple(tuple(int(n) for n in values) for values in about["grid"])
        spectra[name] = tuple(
            Spectrum(tensors[f"{index}.{name}.spectrum.{place}"], (int(shape[0]), int(shape[1])))
            for place, shape in enumerate(about["shapes"])
        )
        key = f"{index}.{name}"
        if f"{key}.ranks" in tensors:
            columns = (tensors[f"{key}.{part}"].tolist() for part in ("ranks", "losses", "costs"))
            for rank, loss, (parameters, macs) in zip(*columns, strict=True):
                if not (loss >= 0 and min(rank) >= 1 and min(parameters, macs) >= 0):
                    raise ValueError(f"candidate {rank} of {entry['name']!r:.80}")
                candidates.append(Candidate(name, tuple(rank), loss, parameters, macs))
    timing = entry["timing"]
    if timing is not None:
        timing = LayerTiming(
            float(timing["dense_ms"]),
            {
                name: tuple(tuple(values) for values in grid)
                for name, grid in timing["grids"].items()
            },
            {name: np.array(table, dtype=float) for name, table in timing["tables"].items()},
        )
    return AnalysedLayer(
        str(entry["name"]),
        str(entry["layer"]),
        _count(entry, "parameters"),
        _count(entry, "macs"),
        entry["reason"],
        methods,
        spectra,
        tuple(candidates),
        grids,
        _moments(f"{index}", entry, tensors),
        _count(entry, "element_size"),
        timing,
        entry.get("reader"),
        tuple(str(name) for name in entry.get("tied", ())),
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
    return Moments(
        tensors.get(f"{key}.inputs"),
        tensors.get(f"{key}.gradients"),
        None if scale is None else float(scale),
        given,
    )


def _count(document: Mapping[str, Any], key: str) -> int:
    value = document[key]
    if type(value) is not int or value < 0:
        raise ValueError(f"{key} is {value!r:.40}")
    return value
