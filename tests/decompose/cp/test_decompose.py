import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.decomposition import parafac
from tensors import collinear_factors, seeds, tensor_of, weight_of

from rankfold.decompose import CP, cp, svd
from rankfold.decompose.cp.form import from_factors, multiply_out
from rankfold.decompose.weights import Whitening
from rankfold.errors import RankError

tensorly.set_backend("pytorch")
shapes = st.lists(st.integers(2, 7), min_size=3, max_size=4).map(tuple)
algorithms = st.sampled_from(["als", "nls"])


def recovered(found: CP, truth: list[torch.Tensor]) -> float:
    """The least cosine between a true term and the term found that is nearest to it."""
    pairs = zip(found.factors, from_factors(truth).factors, strict=True)
    cosines = torch.stack([mine.mT @ theirs for mine, theirs in pairs]).prod(0)
    return cosines.max(0).values.min().item()


@given(algorithms, st.sampled_from(["hosvd", "random", "eigenvalue"]), st.integers(1, 4), seeds)
def test_terms_are_recovered(algorithm, start, rank, seed) -> None:
    """Terms in general position are unique (Kruskal 1977)."""
    truth = collinear_factors(7, rank, 0.3, seed)
    tensor = multiply_out(truth)
    found = cp(
        tensor, rank, algorithm=algorithm, start=start, iterations=300, improvement=0, seed=seed
    )
    assert found.relative_error(tensor) < 1e-5
    assert recovered(found, truth) > 1 - 1e-6


@pytest.mark.parametrize("seed", range(12))
def test_terms_of_equal_norms_do_not_end_as_one(seed) -> None:
    """Their singular vectors are their sum and their difference, a saddle of the error.

    Where rounding does not part them, both came to lie between the two: some of these, by machine.
    """
    truth = collinear_factors(7, 2, 0.3, seed)
    found = cp(multiply_out(truth), 2, iterations=300, improvement=0)
    assert recovered(found, truth) > 1 - 1e-6


@settings(max_examples=10)
@given(st.sampled_from([0.9, 0.95]), st.sampled_from([0.0, 1e-4]), seeds)
def test_collinear_terms_are_recovered_where_alternating_fails(congruence, noise, seed) -> None:
    truth = collinear_factors(20, 5, congruence, seed)
    tensor = multiply_out(truth)
    error = tensor_of(tensor.shape, seed=seed + 7)
    tensor = tensor + noise * tensor.norm() / error.norm() * error
    found = cp(tensor, 5, iterations=300, improvement=1e-10, start="random", seed=seed)
    assert found.relative_error(tensor) <= noise + 1e-7
    assert recovered(found, truth) > 1 - 1e-4


@given(st.integers(2, 12), st.integers(2, 12), algorithms, seeds, st.data())
def test_of_a_matrix_it_is_as_good_as_the_svd(rows, columns, algorithm, seed, data) -> None:
    rank = data.draw(st.integers(1, min(rows, columns)))
    matrix = tensor_of((rows, columns), seed=seed)
    found = cp(matrix, rank, algorithm=algorithm)
    best = svd(matrix, rank).relative_error(matrix)
    assert found.relative_error(matrix) == pytest.approx(best, abs=1e-4)


@settings(max_examples=15)
@given(shapes, seeds, st.integers(1, 6))
def test_no_worse_than_tensorly_from_the_same_start(shape, seed, rank) -> None:
    tensor = tensor_of(shape, seed=seed)
    rank = min(rank, tensor.numel() // max(shape))
    weights, factors = parafac(tensor, rank, n_iter_max=50, init="random", tol=0, random_state=seed)
    start = from_factors([factors[0] * weights, *factors[1:]])
    peer = start.relative_error(tensor)
    for algorithm in ("als", "nls"):
        found = cp(tensor, rank, algorithm=algorithm, start=start)
        assert found.relative_error(tensor) <= peer + 1e-9


@settings(max_examples=15)
@given(shapes, seeds, algorithms)
def test_permuted_modes_give_permuted_factors(shape, seed, algorithm) -> None:
    """To the same local optimum from the same start, if both are followed to their end."""
    start = from_factors([tensor_of((n, 2), seed=seed + k) for k, n in enumerate(shape)])
    tensor = start.to_tensor() + 0.01 * tensor_of(shape, seed=seed)
    order = list(range(len(shape)))[::-1]
    turned = CP(start.norms, tuple(start.factors[mode] for mode in order))
    found = cp(tensor, 2, algorithm=algorithm, start=start, improvement=1e-9)
    other = cp(tensor.permute(order), 2, algorithm=algorithm, start=turned, improvement=1e-9)
    torch.testing.assert_close(
        found.to_tensor(), other.to_tensor().permute(order), rtol=1e-2, atol=1e-2
    )


@given(seeds, algorithms)
def test_more_iterations_are_never_worse(seed, algorithm) -> None:
    tensor = tensor_of((6, 5, 4), seed=seed)
    errors = [
        cp(
            tensor, 3, algorithm=algorithm, iterations=n, improvement=0, compression=False
        ).relative_error(tensor)
        for n in ((1, 5, 40) if algorithm == "als" else (10, 20, 60))
    ]
    assert errors[0] + 1e-7 >= errors[1] and errors[1] + 1e-7 >= errors[2]


def test_compression_changes_the_way_and_not_the_end() -> None:
    truth = collinear_factors(30, 4, 0.5, 0)
    tensor = multiply_out(truth) + 1e-3 * tensor_of((30, 30, 30)) / 30**1.5
    errors = [cp(tensor, 4, compression=c).relative_error(tensor) for c in (True, False)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-6)


def test_tolerance_finds_the_rank_of_a_tensor_that_has_one() -> None:
    tensor = multiply_out(collinear_factors(9, 3, 0.2, 0))
    assert cp(tensor, tolerance=1e-4, improvement=1e-9).ranks == (3,)
    assert cp(tensor, tolerance=0.99).ranks == (1,)
    starts = [cp(tensor, tolerance=0.1, start=s, iterations=2) for s in ("hosvd", "random")]
    assert not torch.equal(*(found.to_tensor() for found in starts))
    hard = tensor_of((3, 3, 3))
    exact = cp(hard, tolerance=1e-9)
    assert exact.relative_error(hard) <= 1e-9 and exact.ranks[0] <= 9


def test_correction_trades_a_little_error_for_much_smaller_terms() -> None:
    tensor = tensor_of((16, 16, 9))
    plain, corrected = cp(tensor, 40), cp(tensor, 40, correction=0.01)
    assert corrected.relative_error(tensor) <= 1.01 * plain.relative_error(tensor) + 1e-9
    assert corrected.sensitivity < plain.sensitivity
    within = cp(tensor, tolerance=0.7, correction=0.0)
    assert within.relative_error(tensor) <= 0.7 + 1e-9


def test_going_on_without_what_is_small_beside_the_error_ends_as_well() -> None:
    """A tensor whose modes are nearly of low rank, at fewer terms than it has."""
    core = tensor_of((6, 6, 6))
    bases = [torch.linalg.qr(tensor_of((20, 6), seed=s)).Q for s in range(3)]
    tensor = torch.einsum("abc,ia,jb,kc->ijk", core, *bases)
    tensor = tensor + 0.02 * tensor.norm() * tensor_of((20, 20, 20), seed=4) / 20**1.5
    first = cp(tensor, 12, algorithm="als", iterations=2, compression=False)
    through, whole = (
        cp(tensor, 12, start=first, iterations=40, compression=c).relative_error(tensor)
        for c in (True, False)
    )
    assert through < 0.8 * first.relative_error(tensor)
    assert through < 1.05 * whole


def test_going_on_is_never_worse_though_the_way_was() -> None:
    """What was left out of the tensor on the way is all that there is in some of its slices."""
    tensor = torch.zeros(12, 12, 12)
    tensor[:3, :3, :3] = tensor_of((3, 3, 3))
    tensor[5:8, 5:8, 5:8] = 0.05 * tensor_of((3, 3, 3), seed=1)
    first = cp(tensor, 6, iterations=30)
    for iterations in (1, 3, 20):
        second = cp(tensor, 6, start=first, iterations=iterations)
        assert second.relative_error(tensor) <= first.relative_error(tensor) + 1e-7


def test_going_on_from_a_start_in_the_metric() -> None:
    tensor = tensor_of((6, 5, 4))
    weights = {0: weight_of(6), 2: weight_of(4)}
    first = cp(tensor, 3, weights=weights, iterations=3)
    second = cp(tensor, 3, weights=weights, start=first)
    assert second.relative_error(tensor, weights) <= first.relative_error(tensor, weights) + 1e-9
    whitened = Whitening.of((6, 5, 4), weights).whiten(tensor)
    direct = cp(whitened, 3)
    assert second.relative_error(tensor, weights) == pytest.approx(
        direct.relative_error(whitened), abs=0.02
    )


def test_the_same_seed_gives_the_same_and_leaves_randomness_alone() -> None:
    tensor, state = tensor_of((6, 5, 4)), torch.get_rng_state()
    first, again, other = (
        cp(tensor, 3, start="random", seed=seed, iterations=3).factors[0] for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_makes_no_sense_is_refused() -> None:
    tensor = tensor_of((6, 5, 4))
    for rank in (0, 21):
        with pytest.raises(RankError, match=r"outside 1\.\.20 of a tensor of shape 6x5x4"):
            cp(tensor, rank)
    with pytest.raises(RankError, match="two modes or more"):
        cp(tensor_of((5,)), 1)
    for arguments in ({}, {"rank": 2, "tolerance": 0.1}, {"tolerance": 0.0}, {"tolerance": 1.0}):
        with pytest.raises(ValueError, match="tolerance"):
            cp(tensor, **arguments)
    with pytest.raises(ValueError, match="'newton'"):
        cp(tensor, 2, algorithm="newton")
    with pytest.raises(ValueError, match="'best'"):
        cp(tensor, 2, start="best")
    with pytest.raises(ValueError, match="correction"):
        cp(tensor, 2, correction=-0.1)
    with pytest.raises(RankError, match="rank 3 and shape 6x5x4, not 2 and 6x5x4"):
        cp(tensor, 2, start=cp(tensor, 3))
