import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankfold.decompose import tucker
from rankfold.decompose.tucker import mode_product, unfold
from rankfold.errors import RankError

TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-13}
shapes = st.lists(st.integers(1, 9), min_size=2, max_size=5).map(tuple)
dtypes = st.sampled_from(list(TOLERANCE))
seeds = st.integers(0, 1000)


def tensor_of(shape, dtype=torch.float64, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


@given(shapes, dtypes, seeds)
def test_full_rank_gives_the_tensor_back(shape, dtype, seed) -> None:
    tensor = tensor_of(shape, dtype, seed)
    found = tucker(tensor)
    assert found.ranks == shape and found.core.dtype == dtype
    assert found.relative_error(tensor) < TOLERANCE[dtype]
    assert found.n_parameters == tensor.numel() + sum(length**2 for length in shape)


@given(shapes, dtypes, seeds, st.data())
def test_truncated_factors_are_orthonormal_and_the_error_is_what_the_core_lacks(
    shape, dtype, seed, data
) -> None:
    ranks = tuple(data.draw(st.integers(1, length)) for length in shape)
    tensor = tensor_of(shape, dtype, seed)
    found = tucker(tensor, ranks)
    assert found.ranks == ranks == tuple(found.core.shape)
    for factor, rank in zip(found.factors, ranks, strict=True):
        torch.testing.assert_close(
            factor.mT @ factor, torch.eye(rank, dtype=dtype), rtol=0, atol=1e-5
        )
    lacking = 1 - (found.core.double().norm() / tensor.double().norm()).square().item()
    assert found.relative_error(tensor) ** 2 == pytest.approx(lacking, abs=1e-5)


@given(shapes, seeds, st.data())
def test_refinement_never_makes_it_worse(shape, seed, data) -> None:
    ranks = tuple(data.draw(st.integers(1, length)) for length in shape)
    tensor = tensor_of(shape, seed=seed)
    errors = [tucker(tensor, ranks, sweeps=sweeps).relative_error(tensor) for sweeps in (0, 1, 4)]
    assert errors[1] <= errors[0] + 1e-12 and errors[2] <= errors[1] + 1e-12


@given(shapes, seeds, st.data())
def test_hosvd_is_quasi_optimal_and_its_error_does_not_grow_with_a_rank(shape, seed, data) -> None:
    """De Lathauwer et al. 2000a, property 10: no worse than all that the modes lose, summed."""
    tensor = tensor_of(shape, seed=seed)
    ranks = tuple(data.draw(st.integers(1, length)) for length in shape)
    energies = [torch.linalg.svdvals(unfold(tensor, mode)).square() for mode in range(len(shape))]
    lost = [energy[rank:].sum().item() for energy, rank in zip(energies, ranks, strict=True)]
    error = tucker(tensor, ranks, sweeps=0).relative_error(tensor)
    norm = tensor.square().sum().item()
    assert max(lost) - 1e-9 <= error**2 * norm <= sum(lost) + 1e-9
    for mode, (rank, length) in enumerate(zip(ranks, shape, strict=True)):
        more = (*ranks[:mode], min(rank + 1, length), *ranks[mode + 1 :])
        assert tucker(tensor, more, sweeps=0).relative_error(tensor) <= error + 1e-12


def test_refinement_of_noise_makes_it_better() -> None:
    tensor = tensor_of((6, 5, 4))
    hosvd, refined = (tucker(tensor, (2, 2, 2), sweeps=s).relative_error(tensor) for s in (0, 3))
    assert refined < 0.95 * hosvd


@given(shapes, seeds, st.data())
def test_a_tensor_of_these_ranks_is_recovered(shape, seed, data) -> None:
    ranks = tuple(data.draw(st.integers(1, length)) for length in shape)
    tensor = tensor_of(ranks, seed=seed)
    for mode, (length, rank) in enumerate(zip(shape, ranks, strict=True)):
        tensor = mode_product(tensor, tensor_of((length, rank), seed=seed + mode + 1), mode)
    assert tucker(tensor, ranks).relative_error(tensor) < 1e-7


@given(seeds)
def test_modes_may_be_chosen_and_permuted(seed) -> None:
    tensor = tensor_of((6, 5, 3, 4), seed=seed)
    found = tucker(tensor, (3, 2), modes=(0, 1))
    assert tuple(found.core.shape) == (3, 2, 3, 4)
    swapped = tucker(tensor.transpose(0, 1), (3, 2), modes=(1, 0))
    torch.testing.assert_close(found.to_tensor(), swapped.to_tensor().transpose(0, 1))


def test_hosvd_holds_the_smaller_ones_in_its_leading_blocks() -> None:
    tensor = tensor_of((6, 5, 4))
    whole, small = tucker(tensor), tucker(tensor, (3, 2, 2), sweeps=0)
    torch.testing.assert_close(whole.core[:3, :2, :2].abs(), small.core.abs())


def test_unfolding_and_mode_product_agree() -> None:
    tensor, matrix = tensor_of((3, 4, 5)), tensor_of((2, 4))
    assert unfold(tensor, 1).shape == (4, 15)
    torch.testing.assert_close(
        unfold(mode_product(tensor, matrix, 1), 1), matrix @ unfold(tensor, 1)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_views_are_taken_as_they_are(dtype) -> None:
    tensor = tensor_of((6, 5, 4), dtype)
    found = tucker(tensor)
    assert found.core.dtype == torch.float32 and found.relative_error(tensor) < 3e-6
    view = tensor.permute(2, 0, 1)
    assert tucker(view).relative_error(view) < 3e-6


def test_zero_tensor() -> None:
    found = tucker(torch.zeros(3, 4, 5), (2, 2, 2))
    assert found.relative_error(torch.zeros(3, 4, 5)) == 0


@pytest.mark.parametrize(
    ("ranks", "modes"),
    [((0, 1), (0, 1)), ((7, 1), (0, 1)), ((1,), (0, 1)), ((1, 1), (0, 0)), ((1, 1), (0, 3))],
)
def test_impossible_ranks_and_modes_are_refused(ranks, modes) -> None:
    with pytest.raises(RankError, match="6x5x4"):
        tucker(torch.randn(6, 5, 4), ranks, modes)


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        tucker(torch.full((2, 3, 4), torch.nan))
