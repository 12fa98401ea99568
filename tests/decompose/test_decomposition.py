"""What holds for every decomposition, over one table of them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tensors import tensor_of, weight_of

from rankfold import decompose
from rankfold.decompose.cp import CP
from rankfold.decompose.decomposition import (
    Decomposition,
    relative_error,
    to_unit_scale,
    working_precision,
)
from rankfold.decompose.weights import Whitening
from rankfold.errors import RankError, TensorError


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    truncated: Callable[..., Decomposition]
    exact: Callable[..., Decomposition] | None
    within: Callable[..., Decomposition] | None
    weighted: tuple[int, ...]  # modes that take a weight
    optimal: bool = False  # whether no other result of these ranks is better


CASES = {
    "svd": Case(
        (9, 12),
        lambda t, **w: decompose.svd(t, 3, **w),
        decompose.svd,
        lambda t, tolerance, **w: decompose.svd(t, tolerance=tolerance, **w),
        (0, 1),
        optimal=True,
    ),
    "randomized_svd": Case(
        (9, 12),
        lambda t, **w: decompose.randomized_svd(t, 3, **w),
        lambda t, **w: decompose.randomized_svd(t, 9, **w),
        lambda t, tolerance, **w: decompose.randomized_svd(t, tolerance=tolerance, **w),
        (0, 1),
        optimal=True,
    ),
    "tall_skinny_svd": Case(
        (40, 7),
        lambda t, **w: decompose.tall_skinny_svd(t, 3, block_rows=11, **w),
        lambda t, **w: decompose.tall_skinny_svd(t, block_rows=11, **w),
        lambda t, tolerance, **w: decompose.tall_skinny_svd(t, tolerance=tolerance, **w),
        (1,),
        optimal=True,
    ),
    "interpolative": Case(
        (9, 12),
        lambda t, **w: decompose.interpolative(t, 3, **w),
        decompose.interpolative,
        lambda t, tolerance, **w: decompose.interpolative(t, tolerance=tolerance, **w),
        (0, 1),
    ),
    "pivoted_qr": Case((9, 12), decompose.pivoted_qr, decompose.pivoted_qr, None, ()),
    "full_rank": Case((9, 12), decompose.full_rank, decompose.full_rank, None, ()),
    "plu": Case((9, 12), decompose.plu, decompose.plu, None, ()),
    "complete plu": Case(
        (9, 12),
        lambda t: decompose.plu(t, complete=True),
        lambda t: decompose.plu(t, complete=True),
        None,
        (),
    ),
    "tucker": Case(
        (7, 6, 5),
        lambda t, **w: decompose.tucker(t, (3, 2, 3), **w),
        decompose.tucker,
        lambda t, tolerance, **w: decompose.tucker(t, tolerance=tolerance, **w),
        (0, 1, 2),
    ),
    "tucker on two modes": Case(
        (7, 6, 5),
        lambda t, **w: decompose.tucker(t, (3, 2), (2, 0), **w),
        lambda t, **w: decompose.tucker(t, modes=(2, 0), **w),
        lambda t, tolerance, **w: decompose.tucker(t, modes=(2, 0), tolerance=tolerance, **w),
        (0, 1, 2),
    ),
    "cp by nls": Case(
        (7, 6, 5),
        lambda t, **w: decompose.cp(t, 4, **w),
        lambda t, **w: decompose.cp(t, 30, **w),
        lambda t, tolerance, **w: decompose.cp(t, tolerance=tolerance, iterations=20, **w),
        (0, 1, 2),
    ),
    "cp by als": Case(
        (7, 6, 5),
        lambda t, **w: decompose.cp(t, 4, algorithm="als", **w),
        lambda t, **w: decompose.cp(t, 30, algorithm="als", **w),
        lambda t, tolerance, **w: decompose.cp(t, tolerance=tolerance, algorithm="als", **w),
        (0, 1, 2),
    ),
    "rank_one_terms": Case(
        (7, 6, 5),
        lambda t, **w: decompose.rank_one_terms(t, 4, **w),
        None,
        lambda t, tolerance, **w: decompose.rank_one_terms(t, tolerance=tolerance, **w),
        (0, 1, 2),
    ),
    "tensor_train": Case(
        (4, 5, 6, 3),
        lambda t, **w: decompose.tensor_train(t, 3, **w),
        decompose.tensor_train,
        lambda t, tolerance, **w: decompose.tensor_train(t, tolerance=tolerance, **w),
        (0, 1, 2, 3),
    ),
    "tensor_ring": Case(
        (4, 5, 6, 3),
        lambda t, **w: decompose.tensor_ring(t, 3, **w),
        decompose.tensor_ring,
        lambda t, tolerance, **w: decompose.tensor_ring(t, tolerance=tolerance, **w),
        (0, 1, 2, 3),
    ),
    "block_term": Case(
        (7, 6, 5),
        lambda t, **w: decompose.block_term(t, (2, 2, 2), 2, **w),
        lambda t, **w: decompose.block_term(t, (7, 6, 5), 1, **w),
        lambda t, tolerance, **w: decompose.block_term(
            t, (2, 2, 2), tolerance=tolerance, iterations=5, **w
        ),
        (0, 1, 2),
    ),
}
each = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-12}


def numbers(found: Decomposition) -> list[torch.Tensor]:
    """All tensors that a result holds."""
    held: list[torch.Tensor] = []
    waiting = list(vars(found).values())
    while waiting:
        value = waiting.pop(0)
        if isinstance(value, torch.Tensor):
            held.append(value)
        elif isinstance(value, tuple):
            waiting.extend(value)
        elif isinstance(value, Decomposition):
            waiting.extend(vars(value).values())
    return held


@each
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_exact_where_nothing_is_cut(case, dtype) -> None:
    if case.exact is None:
        pytest.skip("never exact in a number of terms that is known")
    tensor = tensor_of(case.shape, dtype)
    found = case.exact(tensor)
    assert found.relative_error(tensor) < TOLERANCE[dtype]
    assert found.to_tensor().dtype == dtype


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(case, dtype) -> None:
    tensor = tensor_of(case.shape, dtype)
    found = case.truncated(tensor)
    assert found.to_tensor().dtype == torch.float32
    in_single = case.truncated(tensor.float())
    torch.testing.assert_close(found.to_tensor(), in_single.to_tensor())


@each
def test_the_same_every_time_and_for_any_layout(case) -> None:
    tensor = tensor_of(case.shape)
    first = case.truncated(tensor)
    for again in (case.truncated(tensor), case.truncated(tensor.mT.contiguous().mT)):
        for one, other in zip(numbers(first), numbers(again), strict=True):
            torch.testing.assert_close(one, other)


@each
def test_the_input_is_left_as_it_was(case) -> None:
    tensor = tensor_of(case.shape)
    before = tensor.clone()
    case.truncated(tensor)
    assert torch.equal(tensor, before)


@each
def test_gradients_are_carried_or_not_as_said(case) -> None:
    found = case.truncated(tensor_of(case.shape).requires_grad_())
    carries = case.truncated in (CASES["svd"].truncated, CASES["full_rank"].truncated)
    assert all(part.requires_grad == carries for part in numbers(found) if part.is_floating_point())


@each
def test_zero_tensors(case) -> None:
    zero = torch.zeros(case.shape)
    found = case.truncated(zero)
    assert found.relative_error(zero) == 0
    assert all(torch.isfinite(part).all() for part in numbers(found))


@each
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused(case, value) -> None:
    tensor = tensor_of(case.shape)
    tensor.flatten()[3] = value
    with pytest.raises(TensorError, match="NaN or infinity"):
        case.truncated(tensor)


@each
def test_what_is_no_floating_point_is_refused(case) -> None:
    with pytest.raises(ValueError, match="int64"):
        case.truncated(torch.ones(case.shape, dtype=torch.int64))


@each
def test_empty_tensors_and_scalars_are_refused(case) -> None:
    for shape in ((0, *case.shape[1:]), ()):
        with pytest.raises(RankError):
            case.truncated(torch.zeros(shape))


@each
def test_tolerance_is_kept(case) -> None:
    if case.within is None:
        pytest.skip("is exact")
    for dtype in (torch.float32, torch.float64):
        tensor = tensor_of(case.shape, dtype)
        for tolerance in (0.7, 0.3, 0.05):
            found = case.within(tensor, tolerance)
            assert found.relative_error(tensor) <= tolerance + TOLERANCE[dtype]


@each
@pytest.mark.parametrize("exponent", [-30, 30])
def test_scale_changes_nothing(case, exponent) -> None:
    tensor = tensor_of(case.shape, torch.float32)
    scaled = tensor * 10.0**exponent
    assert case.truncated(scaled).relative_error(scaled) == pytest.approx(
        case.truncated(tensor).relative_error(tensor), abs=1e-4
    )


@each
def test_weighted_error_is_that_of_the_whitened_tensor(case) -> None:
    """Against explicit whitening: the factors differ by the roots and by nothing else."""
    if not case.weighted:
        pytest.skip("is exact, takes no weights")
    tensor = tensor_of(case.shape)
    weights = {mode: weight_of(case.shape[mode], mode) for mode in case.weighted}
    found = case.truncated(tensor, weights=weights)
    whitened = Whitening.of(case.shape, weights).whiten(tensor)
    plain = case.truncated(tensor)
    assert found.relative_error(tensor, weights) <= plain.relative_error(tensor, weights) + 1e-9
    if case.truncated is not CASES["interpolative"].truncated:  # its columns are the matrix's own
        assert found.relative_error(tensor, weights) == pytest.approx(
            case.truncated(whitened).relative_error(whitened), abs=1e-6
        )


@each
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_singular_weights(case, dtype) -> None:
    if not case.weighted:
        pytest.skip("is exact, takes no weights")
    tensor = tensor_of(case.shape, dtype)
    weights = {
        mode: weight_of(case.shape[mode], mode, rank=max(1, case.shape[mode] // 2))
        for mode in case.weighted
    }
    found = case.truncated(tensor, weights=weights)
    assert all(torch.isfinite(part).all() for part in numbers(found))
    plain = case.truncated(tensor)
    assert found.relative_error(tensor, weights) <= plain.relative_error(tensor, weights) + 1e-5
    # At full rank also what the weights ignore comes back; but for CP, whose terms then cancel.
    if case.exact is not None and not (dtype == torch.float32 and isinstance(found, CP)):
        exact = case.exact(tensor, weights=weights)
        assert exact.relative_error(tensor) < (1e-2 if dtype == torch.float32 else 1e-4)
        assert exact.relative_error(tensor, weights) < (1e-4 if dtype == torch.float32 else 1e-8)


@each
def test_weights_that_do_not_fit_are_refused(case) -> None:
    if not case.weighted:
        pytest.skip("is exact, takes no weights")
    tensor = tensor_of(case.shape)
    mode = case.weighted[-1]
    length = case.shape[mode]
    skew = torch.randn(length, length)
    for weight, message in (
        (torch.eye(length + 1), "has the shape"),
        (skew - skew.mT + torch.eye(length), "not symmetric"),
        (-torch.eye(length), "not positive semidefinite"),
        (torch.full((length, length), torch.nan), "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            case.truncated(tensor, weights={mode: weight})


@each
def test_modes_of_length_one(case) -> None:
    if case.exact is None or ("svd" in CASES and case is CASES["randomized_svd"]):
        pytest.skip("asks for more than one rank")
    for mode in range(len(case.shape)):
        shape = [*case.shape[:mode], 1, *case.shape[mode + 1 :]]
        tensor = tensor_of(shape)
        if case.exact in (CASES["cp by nls"].exact, CASES["cp by als"].exact):
            found = decompose.cp(tensor, tensor.numel() // max(shape))
        elif case.exact is CASES["block_term"].exact:
            found = decompose.block_term(tensor, shape, 1)
        else:
            found = case.exact(tensor)
        assert found.relative_error(tensor) < 1e-12


def test_relative_error_is_the_norm_of_the_difference() -> None:
    approximation, tensor = tensor_of((3, 4)), tensor_of((3, 4), seed=1)
    expected = np.linalg.norm(approximation - tensor) / np.linalg.norm(tensor)
    assert relative_error(approximation, tensor) == pytest.approx(expected)
    assert relative_error(tensor, torch.zeros(3, 4)) == pytest.approx(np.linalg.norm(tensor))
    rows, columns = weight_of(3), weight_of(4)
    squares = [
        torch.trace(rows @ part @ columns @ part.mT).item()
        for part in (approximation - tensor, tensor)
    ]
    assert relative_error(approximation, tensor, {0: rows, 1: columns}) == pytest.approx(
        (squares[0] / squares[1]) ** 0.5
    )


@pytest.mark.parametrize("value", [0.0, 1e-300, 1e-6, 0.75, 1.0, 3.0, 1e6, 1e300])
def test_unit_scale(value) -> None:
    tensor = torch.tensor([value, -value / 2], dtype=torch.float64)
    scaled, scale = to_unit_scale(tensor)
    assert torch.equal(scaled * scale, tensor)
    if value == 0 or 1e-4 < value < 1e4:
        assert scaled is tensor
    else:
        assert 0.5 <= scaled.abs().max() < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_norm_that_the_dtype_cannot_hold_is_refused(dtype: torch.dtype) -> None:
    greatest = torch.finfo(dtype).max
    assert working_precision(torch.full((1, 1), greatest, dtype=dtype)).isfinite().all()
    with pytest.raises(TensorError, match="its norm is beyond"):
        working_precision(torch.full((4, 4), greatest / 2, dtype=dtype))
    half = torch.full((4, 4), 65504.0, dtype=torch.float16)
    assert working_precision(half).dtype == torch.float32
