import pytest
import torch
from hypothesis import given
from tensors import seeds, tensor_of

from rankfold.decompose import cp, error_preserving_correction
from rankfold.decompose.cp import correction
from rankfold.decompose.cp.correction import _ridge_within, preserve_error
from rankfold.decompose.cp.form import multiply_out
from rankfold.decompose.cp.target import Target


def degenerate(seed: int, spread: float = 0.05) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A tensor of border rank two, and two terms that cancel each other to come near it.

    a∘a∘b + a∘b∘a + b∘a∘a has rank three and no best approximation of rank two (de Silva and Lim
    2008).
    """
    a, b = torch.linalg.qr(tensor_of((6, 2), seed=seed)).Q.unbind(1)
    terms = [(a, a, b), (a, b, a), (b, a, a)]
    tensor = sum(multiply_out([v[:, None] for v in term]) for term in terms)
    moved = a + spread * b
    factors = [torch.stack([moved, a], dim=1) for _ in range(3)]
    factors[0] = factors[0] * torch.tensor([1, -1]) / spread
    return tensor, factors


@given(seeds)
def test_terms_that_cancel_shrink_within_the_bound(seed) -> None:
    tensor, factors = degenerate(seed)
    target = Target(tensor)
    bound = 4 * target.residual(factors).squared_norm
    found = preserve_error(target, factors, bound, 500, 1e-6)
    assert target.residual(found).squared_norm <= bound * (1 + 1e-6)
    before, after = (
        sum(f.square().sum(0) for f in [torch.stack([x.norm(dim=0) for x in fs]).prod(0)]).sum()
        for fs in (factors, found)
    )
    assert after < 0.6 * before


def test_at_the_same_error_it_never_grows_and_never_gets_worse() -> None:
    tensor = tensor_of((9, 8, 7))
    found = cp(tensor, 12)
    corrected = error_preserving_correction(found, tensor)
    assert corrected.relative_error(tensor) <= found.relative_error(tensor) * (1 + 1e-6)
    assert corrected.sensitivity <= found.sensitivity * (1 + 1e-9)
    looser = error_preserving_correction(found, tensor, error=1.1 * found.relative_error(tensor))
    assert looser.relative_error(tensor) <= 1.1 * found.relative_error(tensor) + 1e-6
    assert looser.sensitivity < corrected.sensitivity


def test_its_scale_is_that_of_the_tensor() -> None:
    tensor = tensor_of((9, 8, 7))
    for scale in (1e-20, 37.0, 1e20):
        found = cp(scale * tensor, 12)
        error = 1.05 * found.relative_error(scale * tensor)
        corrected = error_preserving_correction(found, scale * tensor, error=error)
        assert corrected.relative_error(scale * tensor) == pytest.approx(error, rel=1e-3)


def test_where_no_shorter_factor_is_found_nothing_changes(monkeypatch) -> None:
    tensor = tensor_of((9, 8, 7))
    monkeypatch.setattr(correction, "_ridge_within", lambda *_: None)
    found = cp(tensor, 12)
    same = error_preserving_correction(found, tensor, error=1.1 * found.relative_error(tensor))
    torch.testing.assert_close(same.to_tensor(), found.to_tensor())


def test_an_error_below_the_least_is_not_reached() -> None:
    columns, right = tensor_of((20, 4)), tensor_of((3, 20), seed=1)
    normal, product, total = columns.mT @ columns, right @ columns, right.square().sum().item()
    assert _ridge_within(normal, product, total, 1e-3 * total) is None


def test_a_decomposition_that_exceeds_the_error_comes_back() -> None:
    tensor = tensor_of((5, 4, 3))
    found = cp(tensor, 2)
    same = error_preserving_correction(found, tensor, error=0.01)
    torch.testing.assert_close(same.to_tensor(), found.to_tensor())


def test_with_all_error_allowed_nothing_is_left() -> None:
    tensor = tensor_of((5, 4, 3))
    assert error_preserving_correction(cp(tensor, 2), tensor, error=1.0).sensitivity < 1e-12


def test_the_ridge_factor_is_the_least_one_at_the_bound() -> None:
    """Against a fine scan of the damping."""
    columns, right = tensor_of((20, 4)), tensor_of((3, 20), seed=1)
    normal, product, total = columns.mT @ columns, right @ columns, right.square().sum().item()
    exact = (right.mT - columns @ torch.linalg.lstsq(columns, right.mT).solution).square().sum()
    bound = 1.05 * exact.item()
    found, damping = _ridge_within(normal, product, total, bound)
    for first in (1e-12, 1e-3, 1e9):
        _, same = _ridge_within(normal, product, total, bound, first)
        assert same == pytest.approx(damping, rel=5e-3)
    reached = (found @ columns.mT - right).square().sum().item()
    assert reached == pytest.approx(bound, rel=1e-4) and reached <= bound
    best = min(
        factor.square().sum().item()
        for damping in torch.logspace(-6, 6, 5000, dtype=torch.float64)
        for factor in [torch.linalg.solve(normal + damping * torch.eye(4), product.mT).mT]
        if (factor @ columns.mT - right).square().sum().item() <= bound
    )
    assert found.square().sum().item() <= best * (1 + 1e-3)


def test_another_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match="5x4x2"):
        error_preserving_correction(cp(tensor_of((5, 4, 3)), 2), tensor_of((5, 4, 2)))
