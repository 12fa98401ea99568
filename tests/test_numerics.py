"""The quick core of benchmarks/numerics.py: see tests/stress.py for the cases."""

import functools

import pytest
import stress
import torch
from stress import CASES, DECOMPOSITIONS, LOSSES, MOMENTS, NETWORKS, RECOVERIES, Case, Outcome

from rankfold.methods import DEFAULT_METHODS, METHODS

# Of the others each takes longer; benchmarks/numerics.py tries all.
QUICK = [*DEFAULT_METHODS, "fixed-basis", "tensor-train", "interpolative", "low-rank-inputs"]
FITS = [
    pytest.param(name, layer, id=f"{name}-{type(layer).__name__}")
    for name in QUICK
    for layer in stress.layers_of(METHODS[name]())
]


@functools.cache
def usual(name: str, layer: torch.nn.Module) -> Outcome:
    return stress.outcome_of(METHODS[name](), stress.stressed(layer, CASES[0]))


@pytest.mark.parametrize(("name", "layer"), FITS)
def test_methods(name: str, layer: torch.nn.Module) -> None:
    for case in CASES:
        given = stress.stressed(layer, case)
        found = stress.outcome_of(METHODS[name](), given)
        kind = next(given.parameters()).dtype
        assert stress.what_is_wrong(found, case, usual(name, layer), kind, name) is None, case.name


@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(name, case, id=f"{name}-{case.name}")
        for name in DECOMPOSITIONS
        # Those that alternate take as long for four as the others for all.
        for case in (CASES[::6] if name in ("cp", "block_term", "tensor_ring") else CASES)
    ],
)
def test_decompositions(name: str, case: Case) -> None:
    found = stress.decomposed(DECOMPOSITIONS[name], case)
    assert found.wrong is None
    assert (found.refused is None) == case.is_finite or case.name.startswith("up to")


@pytest.mark.parametrize("name", MOMENTS)
def test_metrics(name: str) -> None:
    moments, is_finite = MOMENTS[name]
    for method in ("svd", "full-rank", "interpolative"):
        layer = stress.stressed(stress.LAYERS[0], CASES[0])
        found = stress.outcome_of(METHODS[method](), layer, moments)
        assert found.wrong is None and (found.refused is None) == is_finite, (method, found)


@pytest.mark.parametrize("metric", ["weight", "response", "fisher", "auto"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str, metric: str) -> None:
    found = stress.network_outcome(name, metric)
    assert found.wrong is None
    assert (found.refused is None) == NETWORKS[name], found.refused


@pytest.mark.parametrize("scale", [1.0, 1e12, 1e-6])
@pytest.mark.parametrize("name", LOSSES)
def test_the_planner(name: str, scale: float) -> None:
    assert max(stress.planned(LOSSES[name], scale)) <= 1 + 1e-8


@pytest.mark.parametrize("name", RECOVERIES)
def test_recovery(name: str) -> None:
    found = stress.recovered(name)
    assert found.wrong is None
    # Of a teacher that gives NaN nothing is learned, and the history says so.
    assert (found.refused is not None) == (name == "NaN in the data")
