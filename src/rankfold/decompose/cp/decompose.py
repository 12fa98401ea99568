"""The canonical polyadic decomposition (CP, also PARAFAC), from a tensor to its terms."""

from dataclasses import dataclass
from typing import Literal

import torch

from rankfold.decompose.cp.als import alternate
from rankfold.decompose.cp.correction import preserve_error
from rankfold.decompose.cp.form import CP, from_factors
from rankfold.decompose.cp.nls import gauss_newton
from rankfold.decompose.cp.start import (
    Start,
    compress,
    exact_factors,
    exact_rank,
    nudged,
    start_factors,
)
from rankfold.decompose.cp.target import Target
from rankfold.decompose.decomposition import shape, to_unit_scale, working_precision
from rankfold.decompose.tucker import tucker
from rankfold.decompose.weights import Weights, Whitening
from rankfold.errors import RankError

Algorithm = Literal["als", "nls"]
# Sweeps of alternating least squares that bring any start near enough for Gauss-Newton.
_APPROACH = 10
# Share of its squared error that is left out on the way from a start, and sweeps with it again.
_SMALL, _POLISH = 0.1, 5


def cp(
    tensor: torch.Tensor,
    rank: int | None = None,
    *,
    tolerance: float | None = None,
    algorithm: Algorithm = "nls",
    start: Start | CP = "hosvd",
    compression: bool = True,
    correction: float | None = None,
    iterations: int = 100,
    improvement: float = 1e-6,
    weights: Weights | None = None,
    seed: int = 0,
) -> CP:
    """The sum of `rank` rank-one terms nearest to a tensor, as far as it can be found.

    `tensor` has two modes or more, float16 to float64; computed in float64. Give either `rank`, or
    `tolerance`, the relative Frobenius error to keep, for which the rank is doubled until it is
    kept and then lowered by bisection: a small rank, not surely the least, which is NP-hard to know
    (Håstad 1990).

    `algorithm` "nls" moves all factors at once and gets through where terms are nearly collinear;
    "als" solves for one factor after the other: simpler, and as good where they are not.
    At most `iterations` of either, until one lowers the relative error by less than `improvement`.
    `start` is "hosvd", "random", "eigenvalue" (exact for exact tensors of low rank, and a start
    near the solution for those with little noise; needs two modes as long as the rank), or a CP of
    the same shape to go on from. With `compression` modes longer than the rank are first reduced to
    it, and on from a CP all modes to what is not small beside its error; the result is refined on
    the whole tensor. With `correction` terms that cancel each other are then shrunk (see
    `error_preserving_correction`), in return for a relative error that is greater by this share, or
    as great as `tolerance`: 0.005 is much, 0 little. `weights`, one for each mode that has one,
    define the norm of the error.

    The same seed gives the same result. Carries no gradient. Raises RankError for a rank outside
    1..exact_rank, the product of all lengths but the longest, at which every tensor is exact, or a
    start that does not apply; ValueError for NaN, infinity, weights that do not fit, a tolerance
    outside (0, 1), or neither or both of rank and tolerance.
    """
    if tensor.dim() < 2 or tensor.numel() == 0:
        raise RankError(f"cp takes two modes or more, not a tensor of shape {shape(tensor)}")
    if (rank is None) == (tolerance is None):
        raise ValueError("give either a rank or a tolerance")
    if tolerance is not None and not 0 < tolerance < 1:
        raise ValueError(f"tolerance must lie in (0, 1), not {tolerance}")
    if correction is not None and correction < 0:
        raise ValueError(f"correction must not be negative, as {correction} is")
    if algorithm not in ("als", "nls"):
        raise ValueError(f"algorithm must be als or nls, not {algorithm!r}")
    full = exact_rank(tensor)
    if rank is not None and not 1 <= rank <= full:
        raise RankError(f"rank {rank} is outside 1..{full} of a tensor of shape {shape(tensor)}")
    work = working_precision(tensor.detach())
    whitening = Whitening.of(tensor.shape, weights)
    scaled, scale = to_unit_scale(whitening.whiten(work.double()))
    fit = _Fit(scaled, algorithm, compression, iterations, improvement, seed)
    if rank is not None:
        factors = fit.at_rank(rank, _started(start, rank, tensor, whitening, scale))
    else:
        assert tolerance is not None
        factors = fit.within(tolerance, "hosvd" if isinstance(start, CP) else start)
    if correction is not None:
        target = Target(scaled)
        bound = (1 + correction) ** 2 * target.residual(factors).squared_norm
        if tolerance is not None:
            bound = tolerance**2 * target.squared_norm
        factors = preserve_error(target, factors, bound)
    factors = [whitening.restore(factor, mode) for mode, factor in enumerate(factors)]
    return _finished(factors, scale, work.dtype)


def error_preserving_correction(
    decomposition: CP,
    tensor: torch.Tensor,
    *,
    error: float | None = None,
    iterations: int = 200,
    improvement: float = 1e-3,
) -> CP:
    """The same error with terms as small as it allows: the least sensitivity (Phan et al. 2019).

    Terms of a CP decomposition can grow without bound while they cancel each other, and such a
    layer cannot be fine-tuned. `error` is the relative error allowed, by default that of the
    decomposition; where terms cancel, half a percent more allows far smaller ones. A decomposition
    that exceeds `error` comes back as it is. At most `iterations` sweeps, until one lowers the
    sensitivity by less than the share `improvement`. Carries no gradient. Raises ValueError for
    NaN, infinity, or shapes that differ.
    """
    if tuple(factor.shape[0] for factor in decomposition.factors) != tensor.shape:
        raise ValueError(f"the decomposition is not one of a tensor of shape {shape(tensor)}")
    work = working_precision(tensor.detach())
    scaled, scale = to_unit_scale(work.double())
    target = Target(scaled)
    factors = [factor.double() for factor in decomposition.factors]
    factors[0] = factors[0] * (decomposition.norms.double() / scale)
    if error is None:
        bound = target.residual(factors).squared_norm
    else:
        bound = error**2 * target.squared_norm
    return _finished(
        preserve_error(target, factors, bound, iterations, improvement), scale, work.dtype
    )


def _started(
    start: Start | CP, rank: int, tensor: torch.Tensor, whitening: Whitening, scale: float
) -> Start | list[torch.Tensor]:
    """A name, or the factors of a CP as ones of the whitened tensor divided by its scale."""
    if not isinstance(start, CP):
        return start
    lengths = tuple(factor.shape[0] for factor in start.factors)
    if start.ranks != (rank,) or lengths != tensor.shape:
        raise RankError(
            f"the start has rank {start.ranks[0]} and shape {'x'.join(map(str, lengths))}, "
            f"not {rank} and {shape(tensor)}"
        )
    factors = [factor.double() for factor in start.factors]
    factors[0] = factors[0] * (start.norms.double() / scale)
    return [
        whitening.roots[mode] @ factor if mode in whitening.roots else factor
        for mode, factor in enumerate(factors)
    ]


def _finished(factors: list[torch.Tensor], scale: float, dtype: torch.dtype) -> CP:
    found = from_factors(factors)
    return CP((found.norms * scale).to(dtype), tuple(factor.to(dtype) for factor in found.factors))


@dataclass(frozen=True)
class _Fit:
    """The search for the factors of one tensor, float64 and of unit scale."""

    tensor: torch.Tensor
    algorithm: Algorithm
    compression: bool
    iterations: int
    improvement: float
    seed: int

    def at_rank(self, rank: int, start: Start | list[torch.Tensor]) -> list[torch.Tensor]:
        if rank == exact_rank(self.tensor):
            return exact_factors(self.tensor)
        if not self.tensor.any():
            return [self.tensor.new_zeros(length, rank) for length in self.tensor.shape]
        if not isinstance(start, str):
            return self._further(start)
        generator = torch.Generator().manual_seed(self.seed)
        reduced, bases = compress(self.tensor, rank) if self.compression else (self.tensor, {})
        if 2 * reduced.numel() > self.tensor.numel():
            reduced, bases = self.tensor, {}
        factors = start_factors(reduced, rank, start, generator)
        if start == "hosvd":
            factors = [nudged(factor, generator) for factor in factors]
        factors = self._improved(Target(reduced), factors)
        if bases:
            factors = [
                bases[mode] @ factor if mode in bases else factor
                for mode, factor in enumerate(factors)
            ]
            factors = self._improved(Target(self.tensor), factors)
        return factors

    def _further(self, start: list[torch.Tensor]) -> list[torch.Tensor]:
        """From these on: first without what of the tensor is small beside their error."""
        target = Target(self.tensor)
        error = target.residual(start).squared_norm
        allowed = (_SMALL * error / target.squared_norm) ** 0.5
        if self.compression and 0 < allowed < 1:
            small = tucker(self.tensor, tolerance=allowed, sweeps=0)
            if 2 * small.core.numel() <= self.tensor.numel():
                turned = zip(small.factors, start, strict=True)
                found = self._improved(Target(small.core), [basis.mT @ f for basis, f in turned])
                factors = [basis @ f for basis, f in zip(small.factors, found, strict=True)]
                sweeps = min(_POLISH, self.iterations)
                factors = alternate(target, factors, sweeps, self.improvement)
                if target.residual(factors).squared_norm <= error:
                    return factors
        return self._improved(target, start)

    def within(self, tolerance: float, start: Start) -> list[torch.Tensor]:
        """The least rank that bisection finds to keep the relative error, and its factors."""
        target = Target(self.tensor)
        allowed = tolerance**2 * target.squared_norm
        too_small, rank = 0, 1
        full = exact_rank(self.tensor)
        while True:
            factors = self.at_rank(rank, start)
            if rank == full or target.residual(factors).squared_norm <= allowed:
                break
            too_small, rank = rank, min(2 * rank, full)
        while rank - too_small > 1:
            middle = (too_small + rank) // 2
            candidate = self.at_rank(middle, start)
            if target.residual(candidate).squared_norm <= allowed:
                rank, factors = middle, candidate
            else:
                too_small = middle
        return factors

    def _improved(self, target: Target, factors: list[torch.Tensor]) -> list[torch.Tensor]:
        if self.algorithm == "als":
            return alternate(target, factors, self.iterations, self.improvement)
        approached = alternate(target, factors, min(_APPROACH, self.iterations), self.improvement)
        return gauss_newton(target, approached, self.iterations, self.improvement)
