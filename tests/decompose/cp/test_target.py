import torch
from hypothesis import given
from hypothesis import strategies as st
from tensors import seeds, tensor_of

from rankfold.decompose.cp.form import khatri_rao, multiply_out
from rankfold.decompose.cp.target import Target, gramian, product_of_others
from rankfold.decompose.unfolding import unfold

shapes = st.lists(st.integers(1, 6), min_size=2, max_size=5).map(tuple)


def mttkrp(tensor: torch.Tensor, factors: list[torch.Tensor], mode: int) -> torch.Tensor:
    """By its definition (Kolda and Bader 2009, section 2.6)."""
    others = [factor for k, factor in enumerate(factors) if k != mode]
    return unfold(tensor, mode) @ khatri_rao(others)


@given(shapes, st.integers(1, 4), seeds)
def test_products_of_all_modes(shape, rank, seed) -> None:
    tensor = tensor_of(shape, seed=seed)
    factors = [tensor_of((length, rank), seed=seed + k) for k, length in enumerate(shape)]
    for mode, found in enumerate(Target(tensor).mttkrp(factors)):
        torch.testing.assert_close(found, mttkrp(tensor, factors, mode))


@given(shapes, st.integers(1, 4), seeds)
def test_a_sweep_uses_the_factors_as_they_are_replaced(shape, rank, seed) -> None:
    tensor = tensor_of(shape, seed=seed)
    factors = [tensor_of((length, rank), seed=seed + k) for k, length in enumerate(shape)]
    visited = []

    def visit(mode: int, product: torch.Tensor) -> None:
        torch.testing.assert_close(product, mttkrp(tensor, factors, mode))
        factors[mode] = tensor_of(factors[mode].shape, seed=seed + 100 + mode)
        visited.append(mode)

    Target(tensor).sweep(factors, visit)
    assert sorted(visited) == list(range(len(shape)))
    assert visited[-1] == len(shape) - 1


def test_residual_and_gramians() -> None:
    tensor = tensor_of((3, 4, 5))
    factors = [tensor_of((length, 2), seed=length) for length in (3, 4, 5)]
    residual = Target(tensor).residual(factors)
    torch.testing.assert_close(residual.tensor, multiply_out(factors) - tensor)
    grams = [gramian(factor) for factor in factors]
    torch.testing.assert_close(product_of_others(grams, 1), grams[0] * grams[2])
    torch.testing.assert_close(product_of_others(grams, 0, 2), grams[1])
    chain = khatri_rao([factors[0], factors[2]])
    torch.testing.assert_close(product_of_others(grams, 1), chain.mT @ chain)
