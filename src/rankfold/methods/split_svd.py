"""Singular value decomposition of each part of a fused linear layer: queries, keys and values.

The three are made from the same features by one matrix, but are read differently, and have ranks of
their own. At equal cost the parts have two thirds of the rank that one decomposition of the whole
has, each to itself; which of the two loses less depends on how much of a space they share, so that
both compete.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn

from rankfold.layers import FusedTwoFactorLinear, check_ranks
from rankfold.methods.method import Rank, Spectrum, check_alignment, why_not_dense
from rankfold.methods.moments import Moments
from rankfold.methods.svd import LowRank, LowRankFamily


@dataclass(frozen=True)
class SplitLowRank:
    """W (parts · n, in) as `parts` decompositions of rank r_i; ranks are (r_1, ..., r_parts).

    Takes linear layers with `parts` times as many outputs as inputs. The candidates are those that
    one gets to by raising, from the least on, each time the rank whose part loses most. Between
    parts the moment of the gradients is taken to be zero.
    """

    name: ClassVar[str] = "split-svd"
    alignment: int = 8
    parts: int = 3

    def __post_init__(self) -> None:
        check_alignment(self.alignment)
        if type(self.parts) is not int or self.parts < 2:
            raise ValueError(f"parts is an integer of at least 2, not {self.parts!r:.40}")

    def why_not(self, layer: nn.Module) -> str | None:
        if (reason := why_not_dense(layer, (nn.Linear,))) is not None:
            return reason
        outputs, inputs = layer.get_parameter("weight").shape
        if outputs != self.parts * inputs:
            return f"{inputs} to {outputs} features are no {self.parts} layers side by side"
        return None

    def fit(self, layer: nn.Linear, moments: Moments) -> "SplitFamily":
        weights = layer.weight.detach().chunk(self.parts)
        gradients = [None] * self.parts if moments.gradients is None else self._blocks(moments)
        metrics = [replace(moments, gradients=block) for block in gradients]
        if moments.scale is None:
            whole = sum(m.squared_error(w) for m, w in zip(metrics, weights, strict=True))
            scale = 1 / whole if whole > 0 else 0.0
            metrics = [replace(metric, scale=scale) for metric in metrics]
        families = []
        for weight, metric in zip(weights, metrics, strict=True):
            part = nn.Linear(layer.in_features, len(weight), False, "meta", weight.dtype)
            part.weight = nn.Parameter(weight, layer.weight.requires_grad)
            families.append(LowRank(self.alignment).fit(part, metric))
        return SplitFamily(layer, families)

    def skeleton(self, layer: nn.Linear, rank: Rank) -> FusedTwoFactorLinear:
        limit = min(layer.in_features, layer.out_features // self.parts)
        check_ranks(rank, [limit] * self.parts, layer)
        return FusedTwoFactorLinear(layer, rank, device="meta")

    def _blocks(self, moments: Moments) -> Sequence[torch.Tensor]:
        """The moments of each part's own gradients."""
        assert moments.gradients is not None
        width = len(moments.gradients) // self.parts
        return [
            moments.gradients[start : start + width, start : start + width].contiguous()
            for start in range(0, len(moments.gradients), width)
        ]


@dataclass(frozen=True)
class SplitFamily:
    """The truncations of each part's singular value decomposition."""

    layer: nn.Linear
    families: Sequence[LowRankFamily]

    @property
    def spectra(self) -> Sequence[Spectrum]:
        return [spectrum for family in self.families for spectrum in family.spectra]

    def ranks(self) -> Sequence[Rank]:
        ladders = [[rank for (rank,) in family.ranks()] for family in self.families]
        steps = [0] * len(ladders)
        found = [tuple(ladder[0] for ladder in ladders)]
        while any(step + 1 < len(ladder) for step, ladder in zip(steps, ladders, strict=True)):
            place = max(range(len(steps)), key=lambda i: self._gain(i, ladders[i], steps[i]))
            steps[place] += 1
            found.append(tuple(ladder[step] for step, ladder in zip(steps, ladders, strict=True)))
        return found

    def _gain(self, place: int, ladder: Sequence[int], step: int) -> float:
        """Of one step up, for each rank that it adds; less than nothing at the top."""
        if step + 1 == len(ladder):
            return -1.0
        family = self.families[place]
        lost = family.loss((ladder[step],)) - family.loss((ladder[step + 1],))
        return lost / (ladder[step + 1] - ladder[step])

    def loss(self, rank: Rank) -> float:
        self._check(rank)
        return sum(one.loss((r,)) for one, r in zip(self.families, rank, strict=True))

    def build(self, rank: Rank) -> FusedTwoFactorLinear:
        self._check(rank)
        form = FusedTwoFactorLinear(self.layer, rank, device="meta")
        like = self.layer.weight
        parts = list(zip(self.families, rank, strict=True))

        def parameter(value: torch.Tensor, trained: bool) -> nn.Parameter:
            value = value.detach().to(like.device, like.dtype, copy=True).contiguous()
            return nn.Parameter(value, trained)

        firsts = torch.cat([family.right[:r] for family, r in parts])
        form.first.weight = parameter(firsts, like.requires_grad)
        biases = None if self.layer.bias is None else self.layer.bias.chunk(len(parts))
        for place, (family, r) in enumerate(parts):
            last = form.last[place]
            last.weight = parameter(family.left[:, :r], like.requires_grad)
            if biases is not None:
                last.bias = parameter(biases[place], self.layer.bias.requires_grad)
        return form.train(self.layer.training)

    def _check(self, rank: Rank) -> None:
        check_ranks(rank, [family.left.shape[1] for family in self.families], self.layer)
