"""Kernels of three factors each, found in turn: block terms and tensor rings."""

from dataclasses import replace

import pytest
import torch
from tensors import tensor_of

from rankfold.decompose import tucker
from rankfold.methods import block_term, three_factors
from rankfold.methods.block_term import _Blocks
from rankfold.methods.tensor_ring import _Ring
from rankfold.methods.three_factors import ThreeFactors, in_turn

OUTPUTS, INPUTS, PLACES = 7, 9, 4


def blocks() -> _Blocks:
    return _Blocks(
        tensor_of((OUTPUTS, 3, 2)), tensor_of((INPUTS, 3, 4), seed=1), tensor_of((3, 2, 4, PLACES))
    )


def ring() -> _Ring:
    return _Ring(
        tensor_of((OUTPUTS, 3, 2)), tensor_of((INPUTS, 3, 4), seed=1), tensor_of((2, 4, PLACES))
    )


both = pytest.mark.parametrize("factors", [blocks(), ring()], ids=["blocks", "ring"])


@both
@pytest.mark.parametrize("many", [0, 100], ids=["by pairs", "by features"])
@pytest.mark.parametrize("most", [1, 2**24])
def test_inner_products_are_those_of_the_features(factors, many, most, monkeypatch) -> None:
    monkeypatch.setattr(block_term, "_MANY", many)
    monkeypatch.setattr(block_term, "_MOST", most)
    for one in (factors, factors.transposed()):
        flat = one.features().flatten(1)
        torch.testing.assert_close(one.gram(), flat @ flat.mT)


@both
def test_what_a_kernel_has_in_common_with_each_entry(factors: ThreeFactors) -> None:
    """The derivatives of its inner product with the product of the factors, by autograd."""
    tensor = tensor_of((OUTPUTS, INPUTS, PLACES), seed=3)
    cores, inputs = (one.clone().requires_grad_() for one in (factors.cores, factors.inputs))
    product = (replace(factors, cores=cores, inputs=inputs).to_tensor() * tensor).sum()
    of_cores, of_inputs = torch.autograd.grad(product, (cores, inputs))
    half = factors.half(tensor)
    torch.testing.assert_close(factors.onto_cores(half), of_cores)
    torch.testing.assert_close(factors.onto_inputs(half), of_inputs)


@pytest.mark.parametrize("inputs", [9, 20], ids=["by features", "by pairs"])
@pytest.mark.parametrize("most", [1, 2**24])
def test_normal_equations_of_cores(inputs, most, monkeypatch) -> None:
    """Products with what the derivative of the kernel by the cores has in common with itself."""
    monkeypatch.setattr(block_term, "_MOST", most)
    factors = replace(blocks(), inputs=tensor_of((inputs, 3, 4), seed=1))
    cores = tensor_of((3, 2, 4, PLACES), seed=6)

    def kernel(cores: torch.Tensor) -> torch.Tensor:
        return replace(factors, cores=cores).to_tensor().flatten()

    by_cores = torch.autograd.functional.jacobian(kernel, cores).flatten(1)
    expected = by_cores.mT @ (by_cores @ cores.flatten())
    torch.testing.assert_close(factors.normal(cores), expected.reshape(cores.shape))


@both
def test_each_step_is_the_best_for_the_other_factors(factors: ThreeFactors) -> None:
    tensor = tensor_of((OUTPUTS, INPUTS, PLACES), seed=3)

    def error(found: ThreeFactors) -> float:
        return (tensor - found.to_tensor()).square().sum().item()

    for matrix, found, one in (
        (tensor, factors.with_best_outputs(tensor), factors),
        (
            tensor.transpose(0, 1),
            factors.with_best_inputs(factors.half(tensor)).transposed(),
            factors.transposed(),
        ),
    ):
        features, wanted = one.features().flatten(1), matrix.flatten(1)
        least = wanted - torch.linalg.lstsq(features.mT, wanted.mT).solution.mT @ features
        missed = matrix - found.to_tensor()
        assert missed.square().sum().item() == pytest.approx(
            least.square().sum().item(), rel=1e-6, abs=1e-9
        )
    before = error(factors.with_best_outputs(tensor))
    start = factors.with_best_outputs(tensor)
    better, gained = start.with_better_cores(start.half(tensor))
    assert error(better) < before
    assert tensor.square().sum().item() - gained == pytest.approx(error(better), rel=1e-9)


@both
def test_turns_never_raise_the_error_and_keep_what_is_exact(factors: ThreeFactors) -> None:
    exact = factors.to_tensor()
    start = replace(factors, cores=tensor_of(factors.cores.shape, seed=5))
    total = exact.square().sum().item()
    errors = [
        (exact - in_turn(exact, start, sweeps).to_tensor()).square().sum().item()
        for sweeps in (0, 1, 2, 5, 50)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01 * total < errors[0]  # a local optimum
    assert (exact - in_turn(exact, factors, 5).to_tensor()).square().sum().item() < 1e-20 * total


@pytest.mark.parametrize("kind", ["blocks", "ring"])
def test_turns_without_what_is_small_beside_the_error_end_as_well(kind, monkeypatch) -> None:
    """Of a kernel whose channels are nearly of low rank, and larger than the error."""
    tensor = torch.einsum(
        "abp,oa,ib->oip",
        tensor_of((8, 8, PLACES)),
        torch.linalg.qr(tensor_of((20, 8))).Q,
        torch.linalg.qr(tensor_of((24, 8), seed=1)).Q,
    )
    noise = tensor_of(tensor.shape, seed=2)
    tensor = tensor + 0.03 * tensor.norm() / noise.norm() * noise
    cores = tensor_of((2, 3, 3, PLACES) if kind == "blocks" else (3, 3, PLACES), seed=5)
    start = {"blocks": _Blocks, "ring": _Ring}[kind](
        tensor_of((20, 2, 3), seed=3), tensor_of((24, 2, 3), seed=4), cores
    )

    def error(found: ThreeFactors) -> float:
        return (tensor - found.to_tensor()).square().sum().item()

    seen = []
    monkeypatch.setattr(three_factors, "tucker", lambda *a, **k: seen.append(1) or tucker(*a, **k))
    through = error(in_turn(tensor, start, 60))
    assert seen
    monkeypatch.setattr(three_factors, "_SMALL", 0.0)
    whole = error(in_turn(tensor, start, 60))
    assert through < error(in_turn(tensor, start, 6))
    assert through < 1.05 * whole
