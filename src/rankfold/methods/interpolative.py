"""A layer that keeps some of its input channels, which stand for the others too.

The interpolative decomposition (Cheng et al. 2005) of a layer's responses: where channels of the
input are correlated, a few of them tell the rest. The kept channels are chosen one by one, each the
one that lowers the error most (greedy column subset selection: Farahat et al. 2013), and the layer
is regressed on their patches (as in the channel pruning of He et al. 2017). Unlike other
factorizations it adds no second layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import nn

from rankfold.decompose.decomposition import working_precision
from rankfold.layers import Dense, SelectedChannels, assign_factors, check_ranks
from rankfold.methods.method import Rank, Spectrum, aligned_ranks, check_alignment, why_not_dense
from rankfold.methods.moments import Moments

# Of the sum of the eigenvalues of the inputs' moment, added to all: what no input shows explains
# nothing. A moment is a sum of float32 products, whose rounding is more than float64's.
_RIDGE = 1e-8
# Rows of a Cholesky factor that are gathered before their product is taken off a moment at once.
_PENDING = 64


@dataclass(frozen=True)
class Interpolative:
    """W ≈ W' of some input channels alone; the rank is their number.

    Takes linear layers and ungrouped convolutions. In the weight metric channels have nothing to
    say about each other, and those with the smallest weights are left out.
    """

    name: ClassVar[str] = "interpolative"
    makes_chains: ClassVar[bool] = False
    alignment: int = 8

    def __post_init__(self) -> None:
        check_alignment(self.alignment)

    def why_not(self, layer: nn.Module) -> str | None:
        if (reason := why_not_dense(layer)) is not None:
            return reason
        inputs = layer.get_parameter("weight").shape[1]
        return None if inputs > self.alignment else f"only {inputs} input channels to choose from"

    def fit(self, layer: Dense, moments: Moments) -> "InterpolativeFamily":
        order, left = _greedy_order(working_precision(layer.weight.detach()), moments)
        return InterpolativeFamily(layer, order, left, moments, self.alignment)

    def skeleton(self, layer: Dense, rank: Rank) -> nn.Sequential:
        check_ranks(rank, (layer.weight.shape[1],), layer)
        return SelectedChannels(layer, torch.empty(rank[0], dtype=torch.int64), device="meta")


@dataclass(frozen=True)
class InterpolativeFamily:
    """The channels in the order in which they are taken; a rank keeps the first of them."""

    layer: Dense
    order: torch.Tensor  # (in,), int64
    squared_errors: torch.Tensor  # (in + 1,), after 0, 1, ... of them
    moments: Moments
    alignment: int

    @property
    def spectra(self) -> Sequence[Spectrum]:
        return ()

    def ranks(self) -> Sequence[Rank]:
        return [(rank,) for rank in aligned_ranks(len(self.order), self.alignment)]

    @cached_property
    def _losses(self) -> torch.Tensor:
        return self.moments.loss_of(self.squared_errors, self.layer.weight.detach())

    def loss(self, rank: Rank) -> float:
        check_ranks(rank, (len(self.order),), self.layer)
        return self._losses[rank[0]].item()

    def build(self, rank: Rank) -> nn.Sequential:
        check_ranks(rank, (len(self.order),), self.layer)
        channels = self.order[: rank[0]].sort().values
        form = SelectedChannels(self.layer, channels)
        weight = _regressed(working_precision(self.layer.weight.detach()), channels, self.moments)
        assign_factors(nn.Sequential(form[1]), [weight], self.layer)
        return form.train(self.layer.training)


def _by_channel(weight: torch.Tensor, moments: Moments) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight as (responses, in, places), and A with as many places, (in, places) squared.

    Of a moment of the channels alone, the kernel's places are responses apart: one place is left.
    """
    double = weight.double().flatten(2) if weight.dim() > 2 else weight.double()[..., None]
    if moments.inputs is not None and len(moments.inputs) == weight[0].numel():
        return double, moments.inputs
    return double.mT.flatten(0, 1)[..., None], moments.inputs


def _greedy_order(weight: torch.Tensor, moments: Moments) -> tuple[torch.Tensor, torch.Tensor]:
    """Channels, each the one that lowers the error most, and the squared errors on the way.

    A pivoted block Cholesky decomposition of A, in which the pivots are chosen by what they explain
    of the responses.
    """
    whitened = weight.double()
    if moments.output_roots is not None:
        whitened = (moments.output_roots[0] @ whitened.flatten(1)).reshape(weight.shape)
    rows, moment = _by_channel(whitened, moments)
    count, places = rows.shape[1:]
    if moment is None:  # each channel explains itself
        norms = rows.square().sum((0, 2)).sort(descending=True, stable=True)
        beyond = norms.values.flip(0).cumsum(0).flip(0)
        return norms.indices, torch.cat([beyond, beyond.new_zeros(1)])
    if len(rows) > len(moment):  # what counts are their products alone, of which a few give all
        rows = torch.linalg.qr(rows.flatten(1), mode="r").R.unflatten(1, (count, places))
    ridge = _ridge(moment) * torch.eye(places).to(moment)
    responses = (rows.flatten(1) @ moment).reshape(rows.shape)
    total = (rows * responses).sum()
    # Of each channel, what the chosen ones do not tell: of its patches and of the responses to it.
    blocks = moment.reshape(count, places, count, places).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    blocks = blocks.clone()
    energies = torch.einsum("rcp,rcq->cpq", responses, responses)
    left, pending = moment.clone(), moment.new_zeros(0, len(moment))
    taken = torch.zeros(count, dtype=torch.bool, device=moment.device)
    order: list[int] = []
    explained: list[torch.Tensor] = []
    for _ in range(count):
        lower, failed = torch.linalg.cholesky_ex(blocks + ridge)
        hidden = failed > 0  # but for rounding, the others tell all of these channels
        lower[hidden] = torch.eye(places).to(moment)
        gains = torch.cholesky_solve(energies, lower).diagonal(dim1=1, dim2=2).sum(1)
        best = int(gains.masked_fill(hidden, 0).masked_fill(taken, -torch.inf).argmax())
        order.append(best)
        taken[best] = True
        seen = torch.linalg.solve_triangular(lower[best], responses[:, best].mT, upper=False)
        if hidden[best]:
            seen = torch.zeros_like(seen)
        explained.append(seen.square().sum())
        block = slice(best * places, (best + 1) * places)
        row = left[block] - pending[:, block].mT @ pending
        towards = torch.linalg.solve_triangular(lower[best], row, upper=False)
        if not hidden[best]:
            steps = towards.reshape(places, count, places)
            along = (seen @ responses.flatten(1)).reshape(steps.shape)
            crossed = torch.einsum("acp,acq->cpq", steps, along)
            moved = torch.tensordot(seen @ seen.mT, steps, dims=1)
            energies += torch.einsum("acp,acq->cpq", steps, moved) - crossed - crossed.mT
            responses -= (seen.mT @ towards).reshape(responses.shape)
            blocks -= torch.einsum("acp,acq->cpq", steps, steps)
            pending = torch.cat([pending, towards])
        if len(pending) >= _PENDING:
            left -= pending.mT @ pending
            pending = pending[:0]
        responses[:, best], blocks[best], energies[best] = 0, 0, 0
    errors = (total - torch.stack(explained).cumsum(0)).clamp_min(0)
    errors[-1] = 0  # all channels are there
    found = torch.cat([total[None], errors]).cummin(0).values
    return torch.tensor(order, device=weight.device), found


def _regressed(weight: torch.Tensor, channels: torch.Tensor, moments: Moments) -> torch.Tensor:
    """The weight of the selected channels, best in the metric: (out, selected, *kernel).

    Its own, plus what the others' responses are on average where the selected are known.
    """
    rows, moment = _by_channel(weight, moments)
    others = torch.ones(rows.shape[1], dtype=torch.bool, device=rows.device)
    others[channels] = False
    found = rows[:, channels]
    if moment is not None and others.any():
        blocks = moment.reshape(*rows.shape[1:], *rows.shape[1:])
        size = found[0].numel()
        own = blocks[channels][:, :, channels].reshape(size, size)
        crossed = torch.tensordot(rows[:, others], blocks[others][:, :, channels], dims=2)
        crossed = crossed.flatten(1)
        lower, failed = torch.linalg.cholesky_ex(own + _ridge(moment) * torch.eye(size).to(own))
        if failed:
            told = crossed @ torch.linalg.pinv(own, hermitian=True)
        else:
            told = torch.cholesky_solve(crossed.mT, lower).mT
        found = found + told.reshape(found.shape)
    # Places that were responses apart come back to the kernel.
    by_output = found.reshape(len(weight), -1, *found.shape[1:]).movedim(1, 2)
    return by_output.reshape(len(weight), len(channels), *weight.shape[2:])


def _ridge(moment: torch.Tensor) -> float:
    """Something to add to the diagonal; 1 for a moment of nothing."""
    return (_RIDGE * moment.diagonal().sum().item()) or 1.0
