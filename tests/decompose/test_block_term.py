import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensors import seeds, tensor_of

from rankfold.decompose import BlockTerm, Tucker, block_term, tucker
from rankfold.decompose.block_term import _with_best_factors, _with_better_cores
from rankfold.errors import RankError


def blocks_of(shape: tuple[int, ...], ranks: tuple[int, ...], count: int, seed: int) -> BlockTerm:
    blocks = []
    for n in range(count):
        factors = (
            tensor_of((length, rank), seed=seed + 10 * n + mode)
            for mode, (length, rank) in enumerate(zip(shape, ranks, strict=True))
        )
        blocks.append(Tucker(tensor_of(ranks, seed=seed + n), tuple(factors), (0, 1, 2)))
    return BlockTerm(tuple(blocks))


@given(seeds, st.integers(1, 3))
def test_it_is_the_sum_of_its_blocks(seed, count) -> None:
    found = block_term(tensor_of((6, 5, 4), seed=seed), (2, 2, 2), count, iterations=3)
    assert len(found.blocks) == count and found.ranks == (2, 2, 2) and found.modes == (0, 1, 2)
    torch.testing.assert_close(found.to_tensor(), sum(block.to_tensor() for block in found.blocks))
    assert found.n_parameters == count * (8 + 2 * (6 + 5 + 4))
    for block in found.blocks:
        for factor in block.factors:
            torch.testing.assert_close(factor.mT @ factor, torch.eye(2, dtype=torch.float64))


def test_blocks_are_recovered() -> None:
    """Blocks in general position, few enough to be unique; now and then a local optimum ends it."""
    errors = []
    for seed in range(5):
        tensor = blocks_of((10, 9, 8), (2, 2, 2), 2, seed).to_tensor()
        found = block_term(tensor, (2, 2, 2), 2, iterations=500, improvement=1e-8)
        errors.append(found.relative_error(tensor))
    assert sorted(errors)[3] < 1e-3


@given(seeds)
def test_every_sweep_lowers_the_error_and_so_does_a_block(seed) -> None:
    tensor = tensor_of((7, 6, 5), seed=seed)
    errors = [
        block_term(tensor, (2, 2, 2), 2, iterations=n, improvement=0).relative_error(tensor)
        for n in (0, 1, 5, 20)
    ]
    for before, after in itertools.pairwise(errors):
        assert after <= before + 1e-9
    assert errors[0] <= tucker(tensor, (2, 2, 2)).relative_error(tensor) + 1e-9


def test_one_block_is_tucker() -> None:
    tensor = tensor_of((7, 6, 5))
    found = block_term(tensor, (3, 2), 1, modes=(2, 0))
    torch.testing.assert_close(found.to_tensor(), tucker(tensor, (3, 2), (2, 0)).to_tensor())


def test_on_two_modes_of_a_kernel_it_beats_tucker_of_as_many_parameters() -> None:
    tensor = tensor_of((12, 12, 3, 3))
    blocks = block_term(tensor, (3, 3), 3, modes=(0, 1))
    single = tucker(tensor, (6, 6), (0, 1))
    assert blocks.n_parameters < single.n_parameters
    found = block_term(tensor, (3, 3), 2, modes=(0, 1))
    assert blocks.relative_error(tensor) < found.relative_error(tensor)


def test_factors_solve_their_least_squares_problem() -> None:
    tensor = tensor_of((7, 6, 5))
    start = list(blocks_of((7, 6, 5), (2, 2, 2), 2, 0).blocks)
    found = _with_best_factors(tensor, start, 1)
    rows = torch.cat(
        [
            Tucker(b.core, (b.factors[0], torch.eye(2, dtype=torch.float64), b.factors[2]), b.modes)
            .to_tensor()
            .movedim(1, 0)
            .flatten(1)
            for b in start
        ]
    )
    unfolded = tensor.movedim(1, 0).flatten(1)
    expected = torch.linalg.lstsq(rows.mT, unfolded.mT).solution.mT @ rows
    torch.testing.assert_close(
        BlockTerm(tuple(found)).to_tensor().movedim(1, 0).flatten(1), expected
    )


def test_cores_solve_theirs() -> None:
    tensor = tensor_of((7, 6, 5))
    blocks = list(blocks_of((7, 6, 5), (1, 2, 2), 2, 0).blocks)
    for _ in range(20):
        blocks, squared = _with_better_cores(tensor, blocks, tensor.square().sum().item())
    columns = torch.cat(
        [torch.kron(torch.kron(b.factors[0], b.factors[1]), b.factors[2]) for b in blocks], dim=1
    )
    best = columns @ torch.linalg.lstsq(columns, tensor.reshape(-1, 1)).solution
    torch.testing.assert_close(BlockTerm(tuple(blocks)).to_tensor().reshape(-1, 1), best)
    assert squared == pytest.approx((best - tensor.reshape(-1, 1)).square().sum().item())


def test_blocks_are_added_until_the_tolerance_is_kept() -> None:
    tensor = blocks_of((8, 9, 7), (2, 2, 2), 2, 0).to_tensor()
    found = block_term(tensor, (2, 2, 2), tolerance=0.05, iterations=500, improvement=1e-7)
    assert len(found.blocks) == 2 and found.relative_error(tensor) <= 0.05


def test_what_makes_no_sense_is_refused() -> None:
    tensor = tensor_of((3, 4, 5))
    for arguments in ({}, {"blocks": 2, "tolerance": 0.1}, {"tolerance": 0.0}):
        with pytest.raises(ValueError, match="tolerance"):
            block_term(tensor, (1, 1, 1), **arguments)
    with pytest.raises(RankError, match="0 blocks of a tensor of shape 3x4x5"):
        block_term(tensor, (1, 1, 1), 0)
    with pytest.raises(RankError, match="3x4x5"):
        block_term(tensor, (4, 1, 1), 1)
