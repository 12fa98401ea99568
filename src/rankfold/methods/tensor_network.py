"""Tensor networks of the weight of a linear layer, fitted in any metric.

The sides of the weight are split into modes. A form starts from a decomposition of the tensor that
this gives, in the weight metric or in that of the moments as far as they are Kronecker products
over the modes; then its factors are solved for in turn, in the metric itself.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from rankfold.decompose import Weights
from rankfold.decompose.decomposition import working_precision
from rankfold.decompose.unfolding import mode_product
from rankfold.layers import TensorNetworkLinear, assign_factors, paired_modes
from rankfold.layers.contraction import plan_contraction
from rankfold.layers.tensor_network import INPUTS, OUTPUTS
from rankfold.methods.alternating import Factors, alternate, improve
from rankfold.methods.method import Rank, why_not_dense
from rankfold.methods.moments import Moments
from rankfold.methods.refit import of_equal_norms
from rankfold.methods.sampled import SampledFamily

# Sweeps over all factors of a fit whose loss is an estimate, and of the one built.
_DRAFT, _SWEEPS = 1, 5
# Of the mean eigenvalue, added to all of what is inverted for a preconditioner.
_DAMPING = 1e-2
_RIDGE = 1e-8
_LARGE = 512  # entries of all bonds of a factor, above which their normal equations are not made

Start = Callable[[TensorNetworkLinear, torch.Tensor, Weights | None], list[Factors]]
"""Candidates of the factors of a form, exact where its ranks allow that.

For a tensor of the modes of the outputs and then of the inputs, float64, and a weight of each mode.
"""


def why_not_split(layer: nn.Module) -> str | None:
    """Why the layer is no linear one with features to split into modes on both sides, or None."""
    if (reason := why_not_dense(layer, (nn.Linear,))) is not None:
        return reason
    fewest = min(layer.get_parameter("weight").shape)
    return None if fewest > 1 else "only 1 feature on a side: svd serves it"


def network_family(
    layer: nn.Linear,
    moments: Moments,
    skeleton: Callable[[Rank], TensorNetworkLinear],
    start: Start,
    candidates: Sequence[int],
) -> SampledFamily:
    """All networks of one rank that `skeleton` makes for a layer; at the last one it is exact.

    Of the candidates, ascending, those with fewer parameters than the layer, and the first and the
    last.
    """
    weight = working_precision(layer.weight.detach()).double()
    *smaller, full = candidates

    def numbers(rank: int) -> int:
        return sum(factor.numel() for factor in skeleton((rank,)).factors)

    saving = smaller[: max(1, bisect_left(smaller, weight.numel(), key=numbers))]
    fit = _Fit(layer, weight, moments, skeleton, start)
    ranks = [(rank,) for rank in (*saving, full)]
    return SampledFamily(layer, moments, ranks, (full,), fit.refined, fit.drafted, exact=True)


Form = TypeVar("Form", bound=TensorNetworkLinear)


def linear_form(kind: Callable[..., Form], layer: nn.Linear, *ranks: Any, modes: int) -> Form:
    """A form of the shape, bias and dtype of a layer, on the meta device, of so many modes."""
    return kind(
        layer.in_features,
        layer.out_features,
        *ranks,
        in_modes=modes,
        out_modes=modes,
        bias=layer.bias is not None,
        device="meta",
        dtype=layer.weight.dtype,
    )


def linear_modes(layer: nn.Linear, modes: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """So many balanced modes of the inputs and of the outputs, pair by pair."""
    return paired_modes(layer.in_features, layer.out_features, modes, modes)


def in_shapes_of(form: TensorNetworkLinear, factors: Sequence[torch.Tensor]) -> Factors:
    """The factors in the shapes that they have in a form."""
    pairs = zip(factors, form.factors, strict=True)
    return tuple(factor.reshape(own.shape) for factor, own in pairs)


def paired(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of modes of outputs and as many of inputs, with one mode for each pair."""
    count = tensor.dim() // 2
    order = [axis for k in range(count) for axis in (k, count + k)]
    apart = tensor.permute(order)
    pairs = zip(tensor.shape[:count], tensor.shape[count:], strict=True)
    return apart.reshape([made * given for made, given in pairs])


def paired_weights(tensor: torch.Tensor, weights: Weights | None) -> Weights | None:
    """The weights of modes of outputs and inputs as weights of their pairs."""
    if weights is None:
        return None
    count = tensor.dim() // 2
    known = [weights.get(mode, torch.eye(n).to(tensor)) for mode, n in enumerate(tensor.shape)]
    return {k: torch.kron(known[k], known[count + k]) for k in range(count)}


def mean_of_mode(moment: torch.Tensor, lengths: Sequence[int], mode: int) -> torch.Tensor:
    """The moment of one of the modes that a moment's sides are split into, the mean over others."""
    if moment.dim() == 1:
        others = [axis for axis in range(len(lengths)) if axis != mode]
        return moment.reshape(*lengths).mean(others).diag() if others else moment.diag()
    apart = math.prod(lengths[:mode]), lengths[mode], math.prod(lengths[mode + 1 :])
    split = moment.reshape(*apart, *apart)
    return torch.einsum("aibajb->ij", split) / (apart[0] * apart[2])


@dataclass(frozen=True, eq=False)
class _Fit:
    """Networks of one weight, (out, in), float64, in a metric."""

    layer: nn.Linear
    weight: torch.Tensor
    moments: Moments
    skeleton: Callable[[Rank], TensorNetworkLinear]
    start: Start

    def drafted(self, rank: Rank) -> TensorNetworkLinear:
        return self._fitted(rank, 0 if self.moments.is_plain else _DRAFT)

    def refined(self, rank: Rank) -> TensorNetworkLinear:
        return self._fitted(rank, _SWEEPS)

    def _fitted(self, rank: Rank, sweeps: int) -> TensorNetworkLinear:
        """From the start on, which is near the best in the weight metric alone."""
        form = self.skeleton(rank)
        factors = tuple(of_equal_norms(self._start(form)))
        sweep = partial(self._sweep, form)
        found = alternate(factors, sweep, form.weight_of, self.weight, self.moments, sweeps)
        assign_factors(form, of_equal_norms(found), self.layer)
        return form

    def _start(self, form: TensorNetworkLinear) -> Factors:
        """The best one, in the metric, of what is found without weights and with them."""
        tensor = self.weight.reshape(*form.out_modes, *form.in_modes)
        found = self.start(form, tensor, None)
        known = dict(enumerate(self._moments_of(form).values()))
        weights = {mode: moment for mode, moment in known.items() if moment.any()}
        if weights and not self.moments.is_plain:
            found = [*found, *self.start(form, tensor, weights)]
        return min(
            found,
            key=lambda factors: self.moments.squared_error(form.weight_of(*factors) - self.weight),
        )

    def _moments_of(self, form: TensorNetworkLinear) -> dict[str, torch.Tensor]:
        """Of each mode by its index, first of the outputs; the identity where nothing is known."""
        found = {}
        for moment, lengths, names in (
            (self.moments.gradients, form.out_modes, OUTPUTS),
            (self.moments.inputs, form.in_modes, INPUTS),
        ):
            for mode, (name, length) in enumerate(zip(names, lengths, strict=False)):
                identity = torch.eye(length).to(self.weight)
                found[name] = identity if moment is None else mean_of_mode(moment, lengths, mode)
        return found

    def _sweep(self, form: TensorNetworkLinear, *factors: torch.Tensor) -> Factors:
        found = list(factors)
        for place in range(len(found)):
            invert = self._inverse(form, found, place)
            product = partial(self._with_factor, form, found, place)
            found[place] = improve(found[place], product, self.weight, self.moments, invert)
        return tuple(of_equal_norms(found))

    def _with_factor(
        self,
        form: TensorNetworkLinear,
        factors: Sequence[torch.Tensor],
        place: int,
        factor: torch.Tensor,
    ) -> torch.Tensor:
        return form.weight_of(*factors[:place], factor, *factors[place + 1 :])

    def _inverse(
        self, form: TensorNetworkLinear, factors: Sequence[torch.Tensor], place: int
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """Of the normal equations of a factor, as far as moments are Kronecker products of modes.

        With E the network of the other factors, (bonds of this one, modes of theirs), these are
        E M Eᵀ for the bonds, and for each mode of its own the moment of that.
        """
        term, moments = form.terms[place], self._moments_of(form)
        own = [index for index in term if index in moments]
        bonds = "".join(index for index in term if index not in moments)
        size = math.prod(form.lengths[index] for index in bonds)
        others = [*form.terms[:place], *form.terms[place + 1 :]]
        theirs = "".join(index for index in moments if index not in own)
        solve = None
        if own and size <= _LARGE:
            network = plan_contraction(f"{','.join(others)}->{bonds}{theirs}", form.lengths)
            rest = network(*factors[:place], *factors[place + 1 :]).flatten(0, len(bonds) - 1)
            weighed = rest
            for axis, index in enumerate(theirs):
                weighed = mode_product(weighed, moments[index], 1 + axis)
            solve = _damped_inverse(rest.flatten(1) @ weighed.flatten(1).mT, _RIDGE)
        inverses = {index: _damped_inverse(moments[index], _DAMPING) for index in own}

        def apply(residual: torch.Tensor) -> torch.Tensor:
            found = residual
            for axis, index in enumerate(term):
                if index in inverses:
                    found = mode_product(found, inverses[index], axis)
            if solve is None:
                return found
            axes = [term.index(index) for index in (*bonds, *own)]
            matrix = found.permute(axes).reshape(size, -1)
            back = [axes.index(axis) for axis in range(len(axes))]
            return (solve @ matrix).reshape([found.shape[axis] for axis in axes]).permute(back)

        return apply


def _damped_inverse(moment: torch.Tensor, share: float) -> torch.Tensor:
    """With this share of the mean eigenvalue added to all; of nothing, the identity."""
    mean = moment.diagonal().mean()
    identity = torch.eye(len(moment)).to(moment)
    lower, failed = torch.linalg.cholesky_ex(moment + share * mean * identity)
    while failed and mean > 0:
        share *= 10
        lower, failed = torch.linalg.cholesky_ex(moment + share * mean * identity)
    return torch.cholesky_inverse(lower) if mean > 0 else identity
