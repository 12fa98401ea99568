"""A kernel as vertical and horizontal filters: the best of each rank, and what improves them.

One unfolding has them as the two factors of a matrix. Where the metric is that of whole patches
that is only a start, and each side is improved in turn for given filters of the other.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch

from rankfold.decompose import symmetric_roots
from rankfold.decompose.decomposition import working_precision
from rankfold.decompose.matrix import leading_eigenvectors
from rankfold.layers import Convolution, split_kernel
from rankfold.methods.alternating import Factors, damped_cholesky, descend, lowered
from rankfold.methods.method import Spectrum
from rankfold.methods.moments import Moments
from rankfold.methods.refit import added_by_each, solve, tail

# Least over greatest eigenvalue of a moment whose inverse root is taken.
_FLOOR = 1e-10


@dataclass(frozen=True, eq=False)
class Features:
    """Vertical filters at all horizontal places of a patch, in a metric."""

    vertical: torch.Tensor  # (rank, in, vertical), float64
    places: int
    of_patches: bool  # whether the metric is that of whole patches, or of channels alone
    seen: torch.Tensor
    """Times the inputs' moment, at all places (rank * places, in * vertical * places); in the
    metric of channels, which is the same everywhere, at one: (rank, in * vertical)."""
    gram: torch.Tensor  # their moment, (rank * places) squared

    @classmethod
    def of(cls, vertical: torch.Tensor, places: int, moments: Moments) -> "Features":
        rank, inputs, column = vertical.shape
        flat = vertical.flatten(1)
        if moments.of_channels(inputs) is moments:
            seen = moments.times_inputs(vertical)
            identity = torch.eye(places).to(vertical)
            return cls(
                vertical, places, False, seen, _symmetric(torch.kron(seen @ flat.mT, identity))
            )
        assert moments.inputs is not None
        patches = moments.inputs.reshape(inputs * column, -1)
        seen = (flat @ patches).reshape(rank * places, -1)
        gram = torch.einsum("qcw,rc->qrw", seen.reshape(rank * places, -1, places), flat)
        return cls(vertical, places, True, seen, _symmetric(gram.reshape(rank * places, -1)))

    def moment_with(self, weight: torch.Tensor) -> torch.Tensor:
        """That of them and the outputs of a weight: (out, rank * places)."""
        if self.of_patches:
            return weight.flatten(1) @ self.seen.mT
        crossed = torch.einsum("rc,ocw->orw", self.seen, weight.flatten(1, 2))
        return crossed.reshape(len(weight), -1)

    def best_horizontal(self, weight: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """The horizontal filters (out, rank, *) of the least error of the weight.

        What no input shows stays as it is in `start`.
        """
        rest = weight - kernel_of(self.vertical, start)
        return start + solve(self.gram, self.moment_with(rest)).reshape(start.shape)

    def response(self, horizontal: torch.Tensor) -> torch.Tensor:
        """K A of the kernel K (out, in, vertical, horizontal) that they make with these filters."""
        if not self.of_patches:
            return kernel_of(self.seen.reshape(self.vertical.shape), horizontal)
        seen = horizontal.flatten(1) @ self.seen
        return seen.reshape(len(seen), *self.vertical.shape[1:], self.places)


@dataclass(frozen=True, eq=False)
class Filters:
    """Vertical (rank, in, *) and horizontal (out, rank, *) filters, and what their kernel misses.

    `missed` is (W - K) A, (out, in, vertical, horizontal), A being the inputs' moment.
    """

    vertical: torch.Tensor
    horizontal: torch.Tensor
    missed: torch.Tensor


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
    _refined: dict[int, Factors] = field(default_factory=dict, repr=False)

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
            features = self.features(self.vertical)
            crossed = features.moment_with(self.weight)
            return added_by_each(features.gram, crossed, self.moments).reshape(
                rank, length, outputs
            )
        # The features are not correlated; of variance 1, or less where they are next to none.
        seen = self.moments.times_inputs(self.vertical)
        variances = (seen * self.vertical.flatten(1)).sum(1).clamp_min(0)
        responses = variances.sqrt()[:, None, None] * self.horizontal.permute(1, 2, 0)
        root = self.moments.output_roots
        return responses if root is None else responses @ root[0]

    @cached_property
    def whole(self) -> float:
        """The squared error of nothing at all."""
        return (self.moments.times_gradients(self.weight) * self._response.flatten(1)).sum().item()

    @cached_property
    def _response(self) -> torch.Tensor:
        """W A, in the shape of W."""
        return self.moments.times_inputs(self.weight).reshape(self.weight.shape)

    @cached_property
    def _columns(self) -> "_Moment | None":
        return _column_moment(self.weight, self.moments)

    def refined(self, rank: int) -> Factors:
        """Vertical (rank, in, *) and horizontal (out, rank, *) filters, of the same norms."""
        if rank not in self._refined:
            vertical, horizontal = self.vertical[:rank], self.horizontal[:, :rank]
            if not self.is_best:
                start = self._with_best_horizontal(vertical, horizontal)
                found = lowered(start, self._sweep, self.squared_error, self.whole)
                vertical, horizontal = found.vertical, found.horizontal
            self._refined[rank] = balanced(vertical, horizontal)
        return self._refined[rank]

    def _sweep(self, filters: Filters) -> Filters:
        return self._with_best_horizontal(self.better_vertical(filters), filters.horizontal)

    def _with_best_horizontal(self, vertical: torch.Tensor, start: torch.Tensor) -> Filters:
        features = self.features(vertical)
        return self.filters(features, features.best_horizontal(self.weight, start))

    def features(self, vertical: torch.Tensor) -> Features:
        return Features.of(vertical, self.weight.shape[-1], self.moments)

    def filters(self, features: Features, horizontal: torch.Tensor) -> Filters:
        missed = self._response - features.response(horizontal)
        return Filters(features.vertical, horizontal, missed)

    def squared_error(self, filters: Filters) -> float:
        difference = self.weight - kernel_of(filters.vertical, filters.horizontal)
        return (self.moments.times_gradients(difference) * filters.missed.flatten(1)).sum().item()

    def better_vertical(self, filters: Filters) -> torch.Tensor:
        """Vertical filters after steps that lower the error for the same horizontal ones."""
        moments, (rank, inputs, column) = self.moments, filters.vertical.shape
        places = self.weight.shape[-1]
        flat, weighed = filters.horizontal.flatten(1), moments.times_gradients(filters.horizontal)
        pairs = _symmetric(flat.mT @ weighed).reshape(rank, places, rank, places)
        gram = torch.einsum("rwsw->rs", pairs)
        lower = damped_cholesky(gram)

        def precondition(residual: torch.Tensor) -> torch.Tensor:
            halfway = residual.flatten(1)
            if self._columns is not None:
                halfway = self._columns.divide(halfway)
            return torch.cholesky_solve(halfway, lower).reshape(residual.shape)

        def normal(direction: torch.Tensor) -> torch.Tensor:
            """Without the kernel of the direction, which has a row for each output."""
            if self.is_best:
                return (gram @ moments.times_inputs(direction)).reshape(direction.shape)
            assert moments.inputs is not None
            patches = moments.inputs.reshape(inputs * column, -1)
            seen = (direction.flatten(1) @ patches).reshape(rank, places, -1, places)
            return torch.einsum("swrv,rvcw->sc", pairs, seen).reshape(direction.shape)

        missed = moments.times_gradients(filters.missed).reshape(filters.missed.shape)
        residual = torch.einsum("orw,oicw->ric", filters.horizontal, missed)
        return descend(filters.vertical, residual, normal, precondition)


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


@dataclass(frozen=True, eq=False)
class _Moment:
    """A moment of channels, the same at all places: its Kronecker product with the identity."""

    channels: torch.Tensor  # (n, n)

    def __matmul__(self, matrix: torch.Tensor) -> torch.Tensor:
        """Of a matrix (n * places, columns)."""
        by_channel = matrix.reshape(len(self.channels), -1)
        return (self.channels @ by_channel).reshape(matrix.shape)

    def divide(self, matrix: torch.Tensor) -> torch.Tensor:
        """The x, (rows, n * places), of x times the moment, slightly damped, = matrix."""
        by_channel = matrix.reshape(len(matrix), len(self.channels), -1).transpose(0, 1)
        found = torch.cholesky_solve(by_channel.flatten(1), self._lower)
        return found.reshape(by_channel.shape).transpose(0, 1).reshape(matrix.shape)

    @cached_property
    def _lower(self) -> torch.Tensor:
        return damped_cholesky(self.channels)

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
