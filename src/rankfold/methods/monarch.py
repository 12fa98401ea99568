"""Monarch matrices: two block-diagonal matrices with a shuffle between, for linear layers.

Dao et al.: Monarch: expressive structured matrices for efficient and accurate training. ICML 2022.
The weight between each block of inputs and each block of outputs has the rank of the form, so that
the nearest one is found by an SVD of every such piece (section 3.3 and theorem 1 there). In a
metric that starts alternating least squares.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import nn

from rankfold.decompose import symmetric_roots
from rankfold.decompose.decomposition import working_precision
from rankfold.layers import (
    MonarchLinear,
    assign_factors,
    balanced_blocks,
    block_lengths,
    check_ranks,
)
from rankfold.methods.alternating import Factors, alternate, damped_cholesky, improve
from rankfold.methods.method import Rank, check_alignment, why_not_dense
from rankfold.methods.moments import Moments
from rankfold.methods.refit import of_equal_norms
from rankfold.methods.sampled import SampledFamily

_FLOOR = 1e-10  # least over greatest eigenvalue of a block of a moment


@dataclass(frozen=True)
class Monarch:
    """W ≈ P L Pᵀ R: R of blocks of inputs, L of blocks of outputs, each pair of some rank.

    Takes linear layers with two inputs and outputs or more. There are as many `blocks` on both
    sides, by default about the square root of the shorter; where there are few, ranks are greater
    and as many parameters keep more of a trained weight. Every rank is a candidate.
    """

    name: ClassVar[str] = "monarch"
    alignment: int = 8
    blocks: int | None = None

    def __post_init__(self) -> None:
        check_alignment(self.alignment)
        if self.blocks is not None and (type(self.blocks) is not int or self.blocks < 1):
            raise ValueError(f"blocks is an integer of at least 1, not {self.blocks!r:.40}")

    def why_not(self, layer: nn.Module) -> str | None:
        return why_not_dense(layer, (nn.Linear,))

    def fit(self, layer: nn.Linear, moments: Moments) -> SampledFamily:
        blocks = self._blocks(layer)
        weight = working_precision(layer.weight.detach()).double()
        fit = _Fit(layer, weight, moments, blocks)
        full = min(fit.lengths)
        most = (weight.numel() - 1) // (blocks**2 * sum(fit.lengths))
        ranks = [*range(1, min(most, full - 1) + 1), full]
        candidates = [(rank,) for rank in ranks]
        return SampledFamily(layer, moments, candidates, (full,), fit.fitted)

    def skeleton(self, layer: nn.Linear, rank: Rank) -> nn.ModuleList:
        return _form(layer, rank, self._blocks(layer))

    def _blocks(self, layer: nn.Linear) -> int:
        sides = layer.in_features, layer.out_features
        return balanced_blocks(*sides) if self.blocks is None else min(self.blocks, *sides)


def _form(layer: nn.Linear, rank: Rank, blocks: int) -> MonarchLinear:
    sides, bias = (layer.in_features, layer.out_features), layer.bias is not None
    check_ranks(rank, (min(block_lengths(*sides, blocks)),), layer)
    return MonarchLinear(*sides, rank[0], blocks, bias, "meta", layer.weight.dtype)


@dataclass(frozen=True, eq=False)
class _Fit:
    """The Monarch matrices near one weight, in a metric."""

    layer: nn.Linear
    weight: torch.Tensor  # (out, in), float64
    moments: Moments
    blocks: int

    @property
    def lengths(self) -> tuple[int, int]:
        """Inputs and outputs of a block."""
        return block_lengths(self.layer.in_features, self.layer.out_features, self.blocks)

    def fitted(self, rank: Rank) -> MonarchLinear:
        form = _form(self.layer, rank, self.blocks)
        factors = self._start(rank[0])
        if not self.moments.is_plain:  # in the weight metric it is the best one
            factors = alternate(factors, self._sweep, self._product, self.weight, self.moments)
        first, second = of_equal_norms(factors)
        assign_factors(form, [first.flatten(1, 2), second.flatten(2)], self.layer)
        return form

    def _start(self, rank: int) -> Factors:
        """The better one, in the metric, of pieces in it and of pieces in the weight metric."""
        starts = [
            (inputs[:, :, :rank], outputs[..., :rank].permute(0, 2, 1, 3))
            for inputs, outputs in self.pieces
        ]
        return min(starts, key=self._squared_error)

    def _squared_error(self, factors: Factors) -> float:
        return self.moments.squared_error(self._product(*factors) - self.weight)

    @cached_property
    def pieces(self) -> list[Factors]:
        """All terms of the weight between any two blocks, in the metric as far as it is of these.

        (block of inputs, block of outputs, term, inputs), then (block of outputs, block of inputs,
        outputs, term), of equal norms; and the same in the weight metric.
        """
        inputs, outputs = self.lengths
        rows, columns = self.weight.shape
        padding = 0, self.blocks * inputs - columns, 0, self.blocks * outputs - rows
        split = nn.functional.pad(self.weight, padding).reshape(
            outputs, self.blocks, self.blocks, inputs
        )
        pieces = split.permute(1, 2, 0, 3)
        found = [_terms(pieces)]
        if not self.moments.is_plain:
            of_outputs, of_inputs = (
                symmetric_roots(_on_diagonal(moment), _FLOOR) for moment in self._wholes
            )
            right, left = _terms(of_outputs.root[:, None] @ pieces @ of_inputs.root)
            right = right @ of_inputs.inverse_root[:, None]
            found.append((right, of_outputs.inverse_root[:, None] @ left))
        return found

    @cached_property
    def _wholes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The moments of outputs and of inputs, (blocks, length of a block) twice each.

        Where none is known, the identity, and between padding a multiple of it.
        """
        inputs, outputs = self.lengths
        gradients, known = (
            self._padded(moment, self.blocks * length)
            for moment, length in ((self.moments.gradients, outputs), (self.moments.inputs, inputs))
        )
        by_output = gradients.reshape(outputs, self.blocks, outputs, self.blocks)
        by_input = known.reshape(self.blocks, inputs, self.blocks, inputs)
        return by_output.permute(1, 0, 3, 2), by_input

    def _padded(self, moment: torch.Tensor | None, length: int) -> torch.Tensor:
        identity = torch.eye(length).to(self.weight)
        if moment is None:
            return identity
        whole = identity * moment.diagonal().mean()
        whole[: len(moment), : len(moment)] = moment
        return whole

    def _product(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        rows, columns = self.weight.shape
        pieces = torch.einsum("qskr,kqrp->sqkp", second, first)
        return pieces.flatten(2).flatten(0, 1)[:rows, :columns]

    def _sweep(self, first: torch.Tensor, second: torch.Tensor) -> Factors:
        """A few steps for what the blocks of outputs do, and a few for those of inputs."""
        of_outputs, of_inputs = self._wholes
        by_output = damped_cholesky(_gram(first, of_inputs))
        on_outputs = damped_cholesky(_on_diagonal(of_outputs))

        def precondition_second(residual: torch.Tensor) -> torch.Tensor:
            flat = torch.cholesky_solve(residual.flatten(2), on_outputs)
            return torch.cholesky_solve(flat.mT, by_output).mT.reshape(residual.shape)

        second = improve(
            second,
            lambda one: self._product(first, one),
            self.weight,
            self.moments,
            precondition_second,
        )
        by_input = damped_cholesky(_gram(second.permute(0, 2, 3, 1), of_outputs))
        on_inputs = damped_cholesky(_on_diagonal(of_inputs))

        def precondition_first(residual: torch.Tensor) -> torch.Tensor:
            flat = torch.cholesky_solve(residual.flatten(1, 2).mT, on_inputs)
            return torch.cholesky_solve(flat.mT, by_input).reshape(residual.shape)

        first = improve(
            first,
            lambda one: self._product(one, second),
            self.weight,
            self.moments,
            precondition_first,
        )
        return first, second


def _terms(pieces: torch.Tensor) -> Factors:
    """All terms of (block of outputs, block of inputs, outputs, inputs), the greatest first."""
    left, values, right = torch.linalg.svd(pieces, full_matrices=False)
    roots = values.sqrt()
    return (roots[..., None] * right).transpose(0, 1), left * roots[..., None, :]


def _on_diagonal(moment: torch.Tensor) -> torch.Tensor:
    """(blocks, length, length) of (blocks, length, blocks, length)."""
    return moment.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _gram(features: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """Of features (a, b, terms, length) of each block a: (b, a terms, a terms), in a moment."""
    gram = torch.einsum("abrn,ancm,cbsm->barcs", features, moment, features)
    return gram.flatten(3).flatten(1, 2)
