import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import seeds, tensor_of

from rankfold.decompose import TensorRing, tensor_ring, tensor_train
from rankfold.decompose.tensor_ring import _alternate, _normal, chain
from rankfold.errors import RankError

TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-12}
shapes = st.lists(st.integers(1, 6), min_size=2, max_size=5).map(tuple)
dtypes = st.sampled_from(list(TOLERANCE))


def ring_of(shape: tuple[int, ...], ranks: tuple[int, ...], seed: int) -> TensorRing:
    return TensorRing(
        tuple(
            tensor_of((ranks[k], n, ranks[(k + 1) % len(ranks)]), seed=seed + k)
            for k, n in enumerate(shape)
        )
    )


@given(shapes, seeds, st.data())
def test_it_is_the_trace_of_the_product_of_slices(shape, seed, data) -> None:
    ranks = tuple(data.draw(st.integers(1, 3)) for _ in shape)
    ring = ring_of(shape, ranks, seed)
    assert ring.ranks == ranks and ring.shape == shape
    assert ring.n_parameters == sum(core.numel() for core in ring.cores)
    index = [data.draw(st.integers(0, length - 1)) for length in shape]
    product = torch.eye(ranks[0], dtype=torch.float64)
    for core, place in zip(ring.cores, index, strict=True):
        product = product @ core[:, place]
    torch.testing.assert_close(ring.to_tensor()[tuple(index)], product.trace())


@given(shapes, dtypes, seeds, st.floats(0.001, 0.9))
def test_exact_without_truncation_and_within_a_tolerance(shape, dtype, seed, tolerance) -> None:
    tensor = tensor_of(shape, dtype, seed)
    exact = tensor_ring(tensor)
    assert exact.shape == shape and exact.cores[0].dtype == dtype
    assert exact.relative_error(tensor) < TOLERANCE[dtype]
    found = tensor_ring(tensor, tolerance=tolerance)
    assert found.relative_error(tensor) <= tolerance + TOLERANCE[dtype]
    assert found.n_parameters <= exact.n_parameters


@given(st.lists(st.integers(3, 6), min_size=3, max_size=4).map(tuple), seeds, st.data())
def test_every_sweep_lowers_the_error(shape, seed, data) -> None:
    ranks = [data.draw(st.integers(1, 2)) for _ in shape]
    tensor = tensor_of(shape, seed=seed)
    errors = [
        tensor_ring(tensor, ranks, iterations=n, improvement=0).relative_error(tensor)
        for n in (0, 1, 5, 20)
    ]
    for before, after in itertools.pairwise(errors):
        assert after <= before + 1e-7


@settings(max_examples=10)
@given(seeds)
def test_a_ring_of_these_ranks_is_recovered(seed) -> None:
    tensor = ring_of((6, 7, 5, 6), (2, 2, 2, 2), seed).to_tensor()
    found = tensor_ring(tensor, 2, iterations=500, improvement=1e-9, starts=4, seed=seed)
    assert found.relative_error(tensor) < 1e-3


@given(shapes, seeds)
def test_with_a_first_rank_of_one_it_is_no_worse_than_the_train(shape, seed) -> None:
    tensor = tensor_of(shape, seed=seed)
    train = tensor_train(tensor, 2)
    ranks = (1, *train.ranks)
    ring = tensor_ring(tensor, ranks)
    assert ring.relative_error(tensor) <= train.relative_error(tensor) + 1e-6


def test_a_core_solves_its_least_squares_problem() -> None:
    tensor = tensor_of((4, 5, 6))
    cores = list(ring_of((4, 5, 6), (2, 3, 2), 0).cores)
    rest = chain(cores[:2]).permute(1, 2, 0).flatten(1)  # (others, rank before x rank after)
    torch.testing.assert_close(_normal(cores, 2), rest.mT @ rest)
    found = _alternate(tensor, cores, 1, 0)
    rest = chain(found[:2]).permute(1, 2, 0).flatten(1)
    solved = torch.linalg.lstsq(rest, tensor.flatten(0, 1)).solution
    torch.testing.assert_close(found[2].permute(0, 2, 1).flatten(0, 1), solved)


def test_ranks_above_what_the_start_has_are_used() -> None:
    tensor = tensor_of((3, 9, 9))
    low = tensor_ring(tensor, (1, 3, 6), iterations=300, improvement=0).relative_error(tensor)
    high = tensor_ring(tensor, (3, 3, 6), iterations=300, improvement=0).relative_error(tensor)
    assert high < 0.9 * low


@pytest.mark.parametrize("ranks", [0, (1, 2), (1, 2, 0)])
def test_impossible_ranks_are_refused(ranks) -> None:
    with pytest.raises(RankError, match="3 ranks of at least 1"):
        tensor_ring(tensor_of((3, 4, 5)), ranks)


def test_what_makes_no_sense_is_refused() -> None:
    tensor = tensor_of((3, 4, 5))
    with pytest.raises(RankError, match=r"ranks 5 and 5 around mode 0 .* 20 entries .* of 3x4x5"):
        tensor_ring(tensor, 5)
    with pytest.raises(ValueError, match="starts"):
        tensor_ring(tensor, 2, starts=0)
    with pytest.raises(ValueError, match="at most one"):
        tensor_ring(tensor, 2, 0.1)
    with pytest.raises(ValueError, match="tolerance"):
        tensor_ring(tensor, tolerance=1.0)
    with pytest.raises(RankError, match="two modes or more"):
        tensor_ring(tensor_of((3,)))
