"""Spatially separable convolutions: along one axis of the kernel, then along the other.

Scheme 2 of Jaderberg, Vedaldi, Zisserman: Speeding up convolutional neural networks with low rank
expansions. BMVC 2014. Its best fit to a weight is a singular value decomposition (Tai, Xiao, Wang,
E: Convolutional neural networks with low-rank regularization. ICLR 2016, theorem 1); AIMET calls it
spatial SVD. In the metric of patches there is no closed form for both factors together: from the
best fit in a simpler metric on they are improved in turn, Jaderberg's data reconstruction.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import nn

from rankfold.decompose import symmetric_roots
from rankfold.decompose.decomposition import working_precision
from rankfold.decompose.matrix import leading_eigenvectors
from rankfold.layers import (
    Convolution,
    SeparableConvolution,
    assign_factors,
    check_ranks,
    separable_limit,
    split_kernel,
)
from rankfold.methods.alternating import Factors, alternate, descend, improve, in_metric
from rankfold.methods.method import (
    Rank,
    Spectrum,
    aligned_ranks,
    check_alignment,
    why_not_spatial,
)
from rankfold.methods.moments import Moments
from rankfold.methods.refit import added_by_each, solve, tail

# Least over greatest eigenvalue of a moment whose inverse root is taken.
_FLOOR = 1e-10


@dataclass(frozen=True)
class Separable:
    """K ≈ Σ_r horizontal[:, r] ⊗ vertical[r]: kx1 in→r, then 1xk r→out.

    Takes ungrouped 2-D and 3-D convolutions whose kernel is longer than 1 along two axes.
    """

    name: ClassVar[str] = "separable"
    alignment: int = 8

    def __post_init__(self) -> None:
        check_alignment(self.alignment)

    def why_not(self, layer: nn.Module) -> str | None:
        return why_not_spatial(layer, axes=2)

    def fit(self, layer: Convolution, moments: Moments) -> "SeparableFamily":
        return SeparableFamily(layer, separate(layer, moments), self.alignment)

    def skeleton(self, layer: Convolution, rank: Rank) -> nn.Sequential:
        check_ranks(rank, (separable_limit(layer),), layer)
        return SeparableConvolution(layer, rank[0], device="meta")


@dataclass(frozen=True, eq=False)
class Separated:
    """A kernel (out, in, vertical, horizontal) as vertical and horizontal filters, at full rank.

    The leading terms are the best fit of each rank in the metric of channels; in that of patches
    they are only a start.
    """

    weight: torch.Tensor  # (out, in, vertical, horizontal), float64
    vertical: torch.Tensor  # (full rank, in, vertical), float64; unit variance of each feature
    horizontal: torch.Tensor  # (out, full rank, horizontal), float64
    squares: torch.Tensor  # (full rank,), squared singular values, descending
    moments: Moments

    @property
    def spectrum(self) -> Spectrum:
        """Of the unfolding (in * vertical) x (out * horizontal)."""
        outputs, inputs, vertical, horizontal = self.weight.shape
        return Spectrum(self.squares.sqrt(), (inputs * vertical, outputs * horizontal))

    @property
    def is_best(self) -> bool:
        """Whether the leading terms are best in the metric itself."""
        return self.moments.of_channels(self.weight.shape[1]) is self.moments

    @cached_property
    def responses(self) -> torch.Tensor:
        """(full rank, horizontal, out): what each feature adds to the outputs, in the metric.

        Of the first r, the squared norm is what the best horizontal filters keep of the weight's;
        the squared error is the rest.
        """
        outputs, rank, length = self.horizontal.shape
        if not self.is_best:
            equations = normal_equations(self.weight, self.vertical, self.moments)
            return added_by_each(*equations, self.moments).reshape(rank, length, outputs)
        # The features are not correlated; of variance 1, or less where they are next to none.
        seen = self.moments.times_inputs(self.vertical)
        variances = (seen * self.vertical.flatten(1)).sum(1).clamp_min(0)
        responses = variances.sqrt()[:, None, None] * self.horizontal.permute(1, 2, 0)
        root = self.moments.output_roots
        return responses if root is None else responses @ root[0]

    def refined(self, rank: int) -> Factors:
        """Vertical (rank, in, *) and horizontal (out, rank, *) filters, of the same norms."""
        vertical, horizontal = self.vertical[:rank], self.horizontal[:, :rank]
        if not self.is_best:
            horizontal = best_horizontal(self.weight, vertical, horizontal, self.moments)
            vertical, horizontal = alternate(
                (vertical, horizontal), self._sweep, kernel_of, self.weight, self.moments
            )
        return balanced(vertical, horizontal)

    def _sweep(self, vertical: torch.Tensor, horizontal: torch.Tensor) -> Factors:
        vertical = better_vertical(self.weight, vertical, horizontal, self.moments)
        return vertical, best_horizontal(self.weight, vertical, horizontal, self.moments)


@dataclass(frozen=True)
class SeparableFamily:
    """All truncations of one singular value decomposition; the one that is built is refined."""

    layer: Convolution
    separated: Separated
    alignment: int

    @property
    def spectra(self) -> Sequence[Spectrum]:
        return (self.separated.spectrum,)

    @property
    def _full(self) -> int:
        return len(self.separated.vertical)

    def ranks(self) -> Sequence[Rank]:
        return [(rank,) for rank in aligned_ranks(self._full, self.alignment)]

    @cached_property
    def _losses(self) -> torch.Tensor:
        """Of each rank from 1 on: (full rank,)."""
        lost = squared_errors(self.separated)
        return self.separated.moments.loss_of(lost, self.separated.weight)

    def loss(self, rank: Rank) -> float:
        """That of the vertical filters of the SVD; `build` goes on to refine them."""
        check_ranks(rank, (self._full,), self.layer)
        return self._losses[rank[0] - 1].item()

    def build(self, rank: Rank) -> nn.Sequential:
        check_ranks(rank, (self._full,), self.layer)
        form = SeparableConvolution(self.layer, rank[0], device="meta")
        assign_factors(form, self.separated.refined(rank[0]), self.layer)
        return form


def separate(layer: Convolution, moments: Moments) -> Separated:
    """The kernel's vertical and horizontal filters, by a singular value decomposition.

    Of the unfolding (in * vertical) x (out * horizontal), in the metric that knows the moment of a
    column of a patch, the same for each, and that of the gradients.
    """
    weight = working_precision(split_kernel(layer)).double()
    outputs, inputs, vertical, horizontal = weight.shape
    matrix = weight.permute(1, 2, 0, 3).reshape(inputs * vertical, -1)
    rows = _column_moment(weight, moments)
    columns = None if moments.gradients is None else _Moment(moments.gradients)
    left, right, squares = _truncations(matrix, rows, columns)
    return Separated(
        weight,
        left.mT.reshape(-1, inputs, vertical),
        right.reshape(-1, outputs, horizontal).movedim(0, 1),
        squares,
        moments,
    )


@dataclass(frozen=True)
class _Moment:
    """A moment of channels, the same at all places: its Kronecker product with the identity."""

    channels: torch.Tensor  # (n, n)

    def __matmul__(self, matrix: torch.Tensor) -> torch.Tensor:
        """Of a matrix (n * places, columns)."""
        by_channel = matrix.reshape(len(self.channels), -1)
        return (self.channels @ by_channel).reshape(matrix.shape)

    def solve(self, matrix: torch.Tensor) -> torch.Tensor:
        """The x, (rows, n * places), of x times the moment = matrix."""
        by_place = matrix.reshape(len(matrix), len(self.channels), -1).mT
        found = solve(self.channels, by_place.flatten(0, 1))
        return found.reshape(by_place.shape).mT.reshape(matrix.shape)

    def roots(self) -> "tuple[_Moment, _Moment]":
        """The square root and its inverse."""
        found = symmetric_roots(self.channels, _FLOOR)
        return _Moment(found.root), _Moment(found.inverse_root)


def _column_moment(weight: torch.Tensor, moments: Moments) -> _Moment | None:
    """That of the inputs in a column of a patch, (in * vertical) squared: the mean over columns."""
    _, inputs, vertical, horizontal = weight.shape
    known = moments.inputs
    if known is None:
        return None
    if len(known) == inputs:
        return _Moment(known)
    split = known.reshape(inputs * vertical, horizontal, inputs * vertical, horizontal)
    return _Moment(split.diagonal(dim1=1, dim2=3).mean(-1))


def _truncations(
    matrix: torch.Tensor, rows: _Moment | None, columns: _Moment | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Left (rows, full rank), right (full rank, columns), squared singular values, in a metric.

    Only the shorter side takes a root of its moment and an inverse; the other factor is a
    projection, so that at full rank the matrix comes back whatever the moments. left is
    orthonormal in the metric of the rows.
    """
    if matrix.shape[0] <= matrix.shape[1]:
        return _by_rows(matrix, rows, columns)
    right, left, squares = _by_rows(matrix.mT, columns, rows)
    left, right = left.mT, right.mT
    seen = left if rows is None else rows @ left
    variance = (left * seen).sum(0)
    least = _FLOOR * variance.max()
    norms = torch.where(least > 0, variance.clamp_min(least), 1).sqrt()
    return left / norms, right * norms[:, None], squares


def _by_rows(
    matrix: torch.Tensor, rows: _Moment | None, columns: _Moment | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same of a matrix with no more rows than columns."""
    roots = None if rows is None else rows.roots()
    turned = matrix if roots is None else roots[0] @ matrix
    seen = turned.mT if columns is None else columns @ turned.mT
    squares, u = leading_eigenvectors(_symmetric(turned @ seen))
    return u if roots is None else roots[1] @ u, u.mT @ turned, squares


def squared_errors(separated: Separated) -> torch.Tensor:
    """Of the leading 1, 2, ... vertical filters with the best horizontal ones: (full rank,)."""
    return tail(separated.responses.square().sum((1, 2)))


def normal_equations(
    weight: torch.Tensor, vertical: torch.Tensor, moments: Moments
) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of the horizontal filters, (out, rank * horizontal), for given vertical ones.

    The moment of the features at all horizontal places, (rank * horizontal) squared, and theirs
    with the outputs, (out, rank * horizontal).
    """
    outputs, inputs, column, places = weight.shape
    rank, flat = len(vertical), vertical.flatten(1)
    if moments.of_channels(inputs) is moments:
        seen = moments.times_inputs(vertical)
        identity = torch.eye(places).to(weight)
        gram = torch.kron(seen @ flat.mT, identity)
        crossed = torch.einsum("rc,ocw->orw", seen, weight.flatten(1, 2))
        return _symmetric(gram), crossed.reshape(outputs, -1)
    assert moments.inputs is not None
    patches = moments.inputs.reshape(inputs * column, -1)
    seen = (flat @ patches).reshape(rank * places, -1)  # the features with all of the patch
    gram = torch.einsum("qcw,rc->qrw", seen.reshape(rank * places, -1, places), flat)
    return _symmetric(gram.reshape(rank * places, -1)), weight.flatten(1) @ seen.mT


def best_horizontal(
    weight: torch.Tensor, vertical: torch.Tensor, start: torch.Tensor, moments: Moments
) -> torch.Tensor:
    """The horizontal filters (out, rank, *) of the least error for given vertical ones.

    What no input shows stays as it is in `start`.
    """
    rest = weight - kernel_of(vertical, start)
    gram, crossed = normal_equations(rest, vertical, moments)
    return start + solve(gram, crossed).reshape(start.shape)


def better_vertical(
    weight: torch.Tensor, vertical: torch.Tensor, horizontal: torch.Tensor, moments: Moments
) -> torch.Tensor:
    """The vertical filters (rank, in, *) after steps that lower the error for given horizontal."""
    rank, inputs = vertical.shape[:2]
    places = weight.shape[-1]
    columns = _column_moment(weight, moments)
    flat, weighed = horizontal.flatten(1), moments.times_gradients(horizontal)
    pairs = _symmetric(flat.mT @ weighed).reshape(rank, places, rank, places)
    gram = torch.einsum("rwsw->rs", pairs)

    def precondition(residual: torch.Tensor) -> torch.Tensor:
        halfway = residual.flatten(1)
        if columns is not None:
            halfway = columns.solve(halfway)
        return solve(gram, halfway.mT).mT.reshape(residual.shape)

    def product(vertical: torch.Tensor) -> torch.Tensor:
        return kernel_of(vertical, horizontal)

    if moments.of_channels(inputs) is moments:
        return improve(vertical, product, weight, moments, precondition)
    assert moments.inputs is not None
    patches = moments.inputs.reshape(vertical[0].numel(), -1)

    def normal(direction: torch.Tensor) -> torch.Tensor:
        """Without the kernel of the direction, which has a row for each output."""
        seen = (direction.flatten(1) @ patches).reshape(rank, places, -1, places)
        return torch.einsum("swrv,rvcw->sc", pairs, seen).reshape(direction.shape)

    rest = in_metric(weight - product(vertical), moments)
    residual = torch.einsum("orw,oicw->ric", horizontal, rest)
    return descend(vertical, residual, normal, precondition)


def balanced(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors (rank, n, *) and (m, rank, *) of the same product, both norms of each term alike."""
    lengths = first.flatten(1).norm(dim=1), second.movedim(1, 0).flatten(1).norm(dim=1)
    ratio = torch.where(lengths[0] * lengths[1] > 0, (lengths[1] / lengths[0]).sqrt(), 1)
    return first * ratio.reshape(-1, 1, 1), second / ratio.reshape(-1, 1)


def kernel_of(vertical: torch.Tensor, horizontal: torch.Tensor) -> torch.Tensor:
    """The kernel (out, in, vertical, horizontal) of both."""
    return torch.einsum("ric,orw->oicw", vertical, horizontal)


def _symmetric(matrix: torch.Tensor) -> torch.Tensor:
    return (matrix + matrix.mT) / 2
