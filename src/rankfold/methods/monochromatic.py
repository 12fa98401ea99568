"""Filters of one colour each, and few colours: for the first convolution of a network.

Denton, Zaremba, Bruna, LeCun, Fergus: Exploiting linear structure within convolutional networks for
efficient evaluation. NIPS 2014 (section 3.1). There the colour of each filter is its leading
singular vector, and these are clustered; here colours, filters and the choice of a colour for each
filter are then improved in turn, each step being the best one for what the others are.

Of the paper's distances Frobenius' is the weight metric, that of the data's covariance the response
metric. Mahalanobis', from the covariance of the gradients, is that of the fisher metric, which has
also what gradients of different outputs have to do with each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import nn

from rankfold.decompose.decomposition import working_precision
from rankfold.decompose.unfolding import mode_product
from rankfold.layers import Convolution, MonochromaticConvolution, assign_factors, check_ranks
from rankfold.methods.method import Rank, Spectrum, aligned_ranks, check_alignment, why_not_spatial
from rankfold.methods.moments import Moments
from rankfold.methods.refit import of_equal_norms, solve

# Rounds of improvement of one number of colours on the way to more, and of the one built.
_ROUNDS, _LAST_ROUNDS = 10, 50
_RANDOM_STARTS = 8
_IMPROVEMENT = 1e-4  # share of the squared error: less ends the rounds
_EXACT = 1e-20  # share of the weight's square that is rounding
# Of the mean eigenvalue of the inputs' moment, added to all: what no input shows stays as it is.
_LEAST = 1e-10


@dataclass(frozen=True)
class Monochromatic:
    """K[o] ≈ colour[c(o)] ⊗ filter[o]: 1x1 in→colours, a colour for each output, depthwise kxk.

    The rank is the number of colours; with one for each output every filter is of rank one, which
    is not the dense layer. Takes ungrouped convolutions with a kernel larger than 1x1 and 2 to
    `most_inputs` input channels: of more, one mixture tells too little. Fits find local optima.
    """

    name: ClassVar[str] = "monochromatic"
    makes_chains: ClassVar[bool] = False
    alignment: int = 8
    most_inputs: int = 32

    def __post_init__(self) -> None:
        check_alignment(self.alignment)
        if type(self.most_inputs) is not int or self.most_inputs < 2:
            raise ValueError(
                f"most_inputs is an integer of at least 2, not {self.most_inputs!r:.40}"
            )

    def why_not(self, layer: nn.Module) -> str | None:
        if (reason := why_not_spatial(layer)) is not None:
            return reason
        inputs = layer.get_parameter("weight").shape[1]
        if inputs == 1:
            return "a single input channel is one colour as it is"
        if inputs > self.most_inputs:
            return f"{inputs} input channels: a method for first layers, of {self.most_inputs}"
        return None

    def fit(self, layer: Convolution, moments: Moments) -> "MonochromaticFamily":
        weight = working_precision(layer.weight.detach()).double().flatten(2)
        damped = moments.damped(_LEAST)
        return MonochromaticFamily(layer, _Fit(weight, damped), moments, self.alignment)

    def skeleton(self, layer: Convolution, rank: Rank) -> nn.Sequential:
        check_ranks(rank, (layer.out_channels,), layer)
        chosen = torch.empty(layer.out_channels, dtype=torch.int64)
        return MonochromaticConvolution(layer, rank[0], chosen, device="meta")


@dataclass(frozen=True)
class MonochromaticFamily:
    """Each number of colours from the fewer before it, with those that help most added to them."""

    layer: Convolution
    fit: "_Fit" = field(repr=False)
    moments: Moments
    alignment: int
    _found: "dict[int, _Colouring]" = field(default_factory=dict, repr=False, compare=False)

    @property
    def spectra(self) -> Sequence[Spectrum]:
        return ()

    def ranks(self) -> Sequence[Rank]:
        return [(rank,) for rank in aligned_ranks(self.layer.out_channels, self.alignment)]

    def loss(self, rank: Rank) -> float:
        """Of the colours and filters after a few rounds; `build` goes on to refine them."""
        check_ranks(rank, (self.layer.out_channels,), self.layer)
        difference = self._with_colours(rank[0]).to_tensor() - self.fit.weight
        return self.moments.loss_of(self.moments.squared_error(difference), self.fit.weight).item()

    def build(self, rank: Rank) -> nn.Sequential:
        check_ranks(rank, (self.layer.out_channels,), self.layer)
        found = self._with_colours(rank[0])
        if rank[0] < len(found.filters):
            found = self.fit.improved(found, _LAST_ROUNDS)
        found = found.balanced()
        form = MonochromaticConvolution(self.layer, rank[0], found.chosen)
        assign_factors(form, (found.colours, found.filters), self.layer)
        return form

    def _with_colours(self, count: int) -> "_Colouring":
        """After a few rounds; all candidates before it are found on the way."""
        if count in self._found:
            return self._found[count]
        fit, found = self.fit, None
        for fewer in range(self.alignment, count, self.alignment):
            if fewer not in self._found:
                self._found[fewer] = fit.with_shared_colours(found, fewer)
            found = self._found[fewer]
        if count < len(fit.weight):
            self._found[count] = fit.with_shared_colours(found, count)
        else:
            self._found[count] = fit.with_own_colours(found)
        return self._found[count]


@dataclass(frozen=True)
class _Colouring:
    """K[o] ≈ colours[chosen[o]] ⊗ filters[o]."""

    colours: torch.Tensor  # (colours, in), float64
    filters: torch.Tensor  # (out, places), float64
    chosen: torch.Tensor  # (out,), int64

    def to_tensor(self) -> torch.Tensor:
        """(out, in, places)."""
        return self.colours[self.chosen][:, :, None] * self.filters[:, None]

    def balanced(self) -> "_Colouring":
        """With colours of one norm, and filters that have it all together."""
        norms = torch.linalg.vector_norm(self.colours, dim=1)
        colours = self.colours / torch.where(norms > 0, norms, 1)[:, None]
        filters = self.filters * norms[self.chosen][:, None]
        colours, filters = of_equal_norms([colours, filters])
        return _Colouring(colours, filters, self.chosen)


@dataclass(frozen=True, eq=False)
class _Fit:
    """The colourings of one weight in a metric.

    Where the gradients are weighed, an error of one output may make up for that of another. A
    majorizer that is diagonal, D ≥ G, takes outputs apart: with Δ the difference as it is, the
    error falls at least as far as that from K̂ - D⁻¹ G Δ in the metric of D and A. Without, D is G.
    """

    weight: torch.Tensor  # (out, in, places), float64
    moments: Moments

    @cached_property
    def _responses(self) -> torch.Tensor:
        """W A, (out, in, places)."""
        return self._seen(self.weight)

    @cached_property
    def _importance(self) -> torch.Tensor:
        """The diagonal of D: (out,), that of G times the greatest eigenvalue of G scaled by it."""
        if self.moments.gradients is None:
            return self.weight.new_ones(len(self.weight))
        sizes = self.moments.gradients.diagonal()
        roots = torch.where(sizes > 0, sizes.rsqrt(), 0)
        scaled = roots[:, None] * self.moments.gradients * roots
        return torch.linalg.eigvalsh(scaled)[-1] * sizes

    @cached_property
    def own(self) -> _Colouring:
        """The best colour and filter for each output, found from the singular vectors on."""
        channels = self.moments.of_channels(self.weight.shape[1])
        root, inverse = channels.input_roots or (None, None)
        tensor = self.weight if root is None else mode_product(self.weight, root, 1)
        colours = torch.linalg.eigh(tensor @ tensor.mT).eigenvectors[..., -1]
        colours = colours if inverse is None else colours @ inverse
        return self.improved(self._by_itself(colours), _LAST_ROUNDS)

    def with_shared_colours(self, fewer: _Colouring | None, count: int) -> _Colouring:
        """The best of some starts: from fewer colours, and from those of random outputs."""
        starts = [self.extended(fewer, count)]
        generator = torch.Generator().manual_seed(0)
        for _ in range(_RANDOM_STARTS):
            outputs = torch.randperm(len(self.weight), generator=generator)[:count]
            starts.append(self._by_itself(self.own.colours[outputs.to(self.weight.device)]))
        return min((self.improved(one, _ROUNDS) for one in starts), key=self.squared_error)

    def with_own_colours(self, shared: _Colouring | None) -> _Colouring:
        """`own`, or what becomes of shared colours when each output may change its copy."""
        if shared is None:
            return self.own
        colours = shared.colours[shared.chosen]
        copies = replace(shared, colours=colours, chosen=self.own.chosen)
        return min(self.own, self.improved(copies, _LAST_ROUNDS), key=self.squared_error)

    def extended(self, found: _Colouring | None, count: int) -> _Colouring:
        """So many colours: those in use and, of the outputs' own, those that explain most besides.

        Greedily, as if outputs had nothing to do with each other.
        """
        candidates = self.own.colours
        explained = _Palette(candidates, self).best_filters(self._responses)[1]
        best = explained.new_zeros(len(explained))
        colours = candidates[:0]
        if found is not None:
            used, chosen = found.chosen.unique(return_inverse=True)
            colours = found.colours[used]
            best = _Palette(colours, self).best_filters(self._responses)[1].amax(1)
        picked: list[int] = []
        for _ in range(count - len(colours)):
            more = (explained - best[:, None]).clamp_min(0)
            picked.append(int((self._importance @ more).argmax()))
            best = torch.maximum(best, explained[:, picked[-1]])
        colours = torch.cat([colours, candidates[picked]])
        if found is None:
            return self._by_itself(colours)
        return _Colouring(colours, found.filters, chosen)

    def improved(self, found: _Colouring, rounds: int) -> _Colouring:
        """Filters and their choice of a colour, then colours, each as good as the others allow.

        Where there is a colour for each output, it keeps it.
        """
        count = len(found.colours)
        whole = self.moments.squared_error(self.weight)
        error = self.squared_error(found)
        for _ in range(rounds):
            candidate = found
            if count < len(self.weight) and len(found.chosen.unique()) < count:
                candidate = self.extended(found, count)
            candidate = self._with_best_colours(self._with_best_filters(candidate))
            before, error = error, self.squared_error(candidate)
            if not error < before:
                break
            found = candidate
            if error <= _EXACT * whole or before - error < _IMPROVEMENT * before:
                break
        return found

    def squared_error(self, found: _Colouring) -> float:
        return self.moments.squared_error(found.to_tensor() - self.weight)

    def _by_itself(self, colours: torch.Tensor) -> _Colouring:
        """Filters, and their choice of a colour, as if outputs had nothing to do with each other.

        Where there are as many colours, each output has its own.
        """
        filters, explained = _Palette(colours, self).best_filters(self._responses)
        rows = torch.arange(len(filters), device=filters.device)
        chosen = rows if len(colours) == len(filters) else explained.argmax(1)
        return _Colouring(colours, filters[rows, chosen], chosen)

    def _with_best_filters(self, found: _Colouring) -> _Colouring:
        aims = self._seen(found.to_tensor() - self._step(found))
        filters, explained = _Palette(found.colours, self).best_filters(aims)
        chosen = found.chosen
        if len(found.colours) < len(self.weight):
            chosen = explained.argmax(1)
        return _Colouring(
            found.colours,
            filters[torch.arange(len(filters), device=filters.device), chosen],
            chosen,
        )

    def _with_best_colours(self, found: _Colouring) -> _Colouring:
        """From where they are, by Newton's step."""
        belongs = nn.functional.one_hot(found.chosen, len(found.colours)).to(found.filters).mT
        weighed = self._importance[:, None] * found.filters
        slopes = torch.einsum("op,oip->oi", weighed, self._seen(self._step(found)))
        kernels = torch.einsum("co,op,oq->cpq", belongs, weighed, found.filters)
        steps = solve(self._of_channels(kernels), (belongs @ slopes)[:, None])[:, 0]
        return replace(found, colours=found.colours - steps)

    def _step(self, found: _Colouring) -> torch.Tensor:
        """How far the weight is from where it should be, (out, in, places)."""
        difference = found.to_tensor() - self.weight
        if self.moments.gradients is None:
            return difference
        weighed = self.moments.times_gradients(difference).reshape(difference.shape)
        importance = self._importance[:, None, None]
        return torch.where(importance > 0, weighed / importance, 0)

    def _seen(self, weight: torch.Tensor) -> torch.Tensor:
        """W A, of any rows (rows, in, places)."""
        return self.moments.times_inputs(weight).reshape(weight.shape)

    def of_places(self, colours: torch.Tensor) -> torch.Tensor:
        """The moments of the places as seen in each colour: (colours, places, places)."""
        _, inputs, places = self.weight.shape
        moment = self.moments.inputs
        if moment is None or len(moment) == inputs:
            seen = colours if moment is None else colours @ moment
            identity = torch.eye(places, dtype=seen.dtype, device=seen.device)
            return (seen * colours).sum(1)[:, None, None] * identity
        patches = moment.reshape(inputs, places, inputs, places)
        return torch.einsum("ipjq,ci,cj->cpq", patches, colours, colours)

    def _of_channels(self, kernels: torch.Tensor) -> torch.Tensor:
        """Those of the channels for kernels (colours, places, places): (colours, in, in)."""
        _, inputs, places = self.weight.shape
        moment = self.moments.inputs
        if moment is None or len(moment) == inputs:
            identity = torch.eye(inputs, dtype=kernels.dtype, device=kernels.device)
            sums = kernels.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
            return sums * (identity if moment is None else moment)
        patches = moment.reshape(inputs, places, inputs, places)
        return torch.einsum("ipjq,cpq->cij", patches, kernels)


@dataclass(frozen=True, eq=False)
class _Palette:
    """Colours to choose from."""

    colours: torch.Tensor  # (colours, in)
    fit: _Fit

    @cached_property
    def _inverses(self) -> torch.Tensor:
        """Of the moments of the places in each colour: (colours, places, places)."""
        moments = self.fit.of_places(self.colours)
        identity = torch.eye(moments.shape[1], dtype=moments.dtype, device=moments.device)
        return solve(moments, identity.expand_as(moments))

    def best_filters(self, responses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For responses W A (rows, in, places), the best filter of each row in each colour.

        (rows, colours, places), and how much of the row's square each explains, (rows, colours).
        """
        seen = torch.einsum("ci,nip->ncp", self.colours, responses)
        filters = torch.einsum("ncp,cpq->ncq", seen, self._inverses)
        return filters, (filters * seen).sum(-1)
