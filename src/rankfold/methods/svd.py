"""Singular value decomposition of a linear layer, or of a convolution seen as one.

The two-factor form: Denton et al. 2014 and Kim et al. 2016 (section 3.1, first and fully connected
layers) for the weight metric. In the metric of second moments of the inputs it is the whitened SVD
(Zhang et al. 2016, SVD-LLM), with those of the gradients as well the Kronecker-factored Fisher's.
An embedding E (n, d) is the linear layer Eᵀ of one-hot inputs, whose second moment is the diagonal
of the tokens' frequencies.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, cast

import torch
from torch import nn

from rankfold.decompose import svd
from rankfold.decompose.decomposition import working_precision
from rankfold.decompose.matrix import leading_eigenvectors
from rankfold.decompose.unfolding import gram
from rankfold.layers import (
    Dense,
    TiedLayers,
    TiedTwoFactor,
    TwoFactorConvolution,
    TwoFactorEmbedding,
    TwoFactorLinear,
    assign_factors,
    check_ranks,
)
from rankfold.methods.method import Rank, Spectrum, aligned_ranks, check_alignment, why_not_dense
from rankfold.methods.moments import Moments

Lookup = nn.Embedding | TiedLayers


@dataclass(frozen=True)
class LowRank:
    """W, unfolded to (out, in * kernel size), as two factors of one rank.

    Takes linear layers and ungrouped convolutions of any kernel. For many input channels and a
    large kernel Tucker-2 has a second rank to spend; for the first layers of a network, whose input
    channels are few, and for 1x1 kernels this is the method. Takes embeddings too, and the weight
    that embeddings and linear layers share (`TiedLayers`), whose two factors they share then.
    """

    name: ClassVar[str] = "svd"
    knows_diagonals: ClassVar[bool] = True
    alignment: int = 8

    def __post_init__(self) -> None:
        check_alignment(self.alignment)

    def why_not(self, layer: nn.Module) -> str | None:
        if type(layer) is nn.Embedding:
            return why_not_lookup(layer)
        if isinstance(layer, TiedLayers):
            reasons = map(self.why_not, layer)
            return next((reason for reason in reasons if reason is not None), None)
        return why_not_dense(layer)

    def fit(self, layer: Dense | Lookup, moments: Moments) -> "LowRankFamily":
        left, right, values = low_rank_factors(matrix_of(layer), moments)
        return LowRankFamily(layer, left, right, values, moments, self.alignment)

    def skeleton(self, layer: Dense | Lookup, rank: Rank) -> nn.Module:
        return _form(layer, rank)


@dataclass(frozen=True)
class LowRankFamily:
    """All truncations of one singular value decomposition, in the metric of the moments."""

    layer: Dense | Lookup
    left: torch.Tensor  # (out, full rank)
    right: torch.Tensor  # (full rank, in * kernel size), of the same norms as the columns of left
    singular_values: torch.Tensor  # (full rank,), of the whitened weight, float64
    moments: Moments
    alignment: int

    @property
    def spectra(self) -> Sequence[Spectrum]:
        return (Spectrum(self.singular_values, (self.left.shape[0], self.right.shape[1])),)

    def ranks(self) -> Sequence[Rank]:
        return [(rank,) for rank in aligned_ranks(self.left.shape[1], self.alignment)]

    @cached_property
    def _losses(self) -> torch.Tensor:
        """Of each rank from 0 on: (full rank + 1,)."""
        energy = self.singular_values.square()
        beyond = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])
        return self.moments.loss_of(beyond, matrix_of(self.layer))

    def loss(self, rank: Rank) -> float:
        check_ranks(rank, self.left.shape[1:], self.layer)
        return self._losses[rank[0]].item()

    def build(self, rank: Rank) -> nn.Module:
        form = _form(self.layer, rank)
        first, last = self.right[: rank[0]], self.left[:, : rank[0]]
        if isinstance(self.layer, TiedLayers):
            cast(TiedTwoFactor, form).assign(first.mT, last, self.layer)
            return form
        first = first.mT if isinstance(self.layer, nn.Embedding) else first
        assign_factors(cast(nn.Sequential, form), (first, last), self.layer)
        return form


def low_rank_factors(
    weight: torch.Tensor, moments: Moments, rank: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Left and right factors, balanced, in the metric: up to a rank, or all; all singular values.

    Of a weight (out, in, *kernel): (out, rank), (rank, in * kernel size) and (full rank,).
    """
    weight = working_precision(weight)
    if moments.is_plain:
        plain = svd(weight.flatten(1))
        left, right = plain.balanced()
        return left[:, :rank], right[:rank], plain.singular_values.double()
    double = weight.double().flatten(1)
    rows, columns = double.shape
    if rows <= columns or (moments.inputs is not None and len(moments.inputs) != columns):
        # Ŵ = G^-½ U Uᵀ G^½ W, with U of (G^½ W) A (G^½ W)ᵀ: A needs no root, let alone an inverse.
        root, inverse = moments.output_roots or (None, None)
        turned = double if root is None else root @ double
        seen = moments.times_inputs(turned.reshape(weight.shape)) @ turned.mT
        left, right, values = _from_the_left(turned, seen, rank)
        left = left if inverse is None else inverse @ left
    else:
        root, inverse = moments.input_factor or (None, None)
        turned = double if root is None else double @ root
        alike = moments.gradients is None
        seen = gram(turned.mT) if alike else turned.mT @ moments.times_gradients(turned)
        squares, v = leading_eigenvectors(seen)
        values, v = squares.sqrt(), v[:, :rank]
        left, right = turned @ v, v.mT if inverse is None else v.mT @ inverse
    left, right = _balanced(left, right)
    return left.to(weight.dtype), right.to(weight.dtype), values


def low_rank_factors_of_outputs(
    weight: torch.Tensor, outputs: torch.Tensor, rank: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `low_rank_factors` in the metric of the inputs, of which only the outputs are known.

    `outputs` is E[y yᵀ] = W A Wᵀ, (out, out), float64, of y = W x without the bias: for fewer
    outputs than inputs that is all that the metric comes to, and the moment A is never made.
    """
    weight = working_precision(weight)
    left, right, values = _from_the_left(weight.double().flatten(1), outputs, rank)
    left, right = _balanced(left, right)
    return left.to(weight.dtype), right.to(weight.dtype), values


def _from_the_left(
    weight: torch.Tensor, seen: torch.Tensor, rank: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U and Uᵀ W up to a rank, and all singular values, of the moment W A Wᵀ."""
    squares, u = leading_eigenvectors(seen)
    full = min(weight.shape)
    left = u[:, :full][:, :rank]
    return left, left.mT @ weight, squares[:full].sqrt()


def _balanced(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product, with columns on the left as long as the rows on the right."""
    lengths = torch.linalg.vector_norm(left, dim=0), torch.linalg.vector_norm(right, dim=1)
    ratio = torch.where(lengths[0] * lengths[1] > 0, (lengths[1] / lengths[0]).sqrt(), 1)
    return left * ratio, right / ratio[:, None]


def why_not_lookup(layer: nn.Embedding) -> str | None:
    """Why an embedding cannot be looked up in factors, or None."""
    if layer.max_norm is not None:
        return "its rows are renormalised as they are looked up (max_norm)"
    if layer.sparse:
        return "its gradients are sparse (sparse=True), those of factors are not"
    if layer.scale_grad_by_freq:
        return "its gradients are scaled by the tokens' frequencies (scale_grad_by_freq)"
    return "its weight is empty" if layer.weight.numel() == 0 else None


def matrix_of(layer: Dense | Lookup) -> torch.Tensor:
    """What multiplies the inputs, one-hot ones of an embedding: (out, in, *kernel)."""
    weight = layer.weight.detach()
    return weight.mT if isinstance(layer, nn.Embedding | TiedLayers) else weight


def _form(layer: Dense | Lookup, rank: Rank) -> nn.Module:
    check_ranks(rank, (min(layer.weight.flatten(1).shape),), layer)
    if isinstance(layer, TiedLayers):
        return TiedTwoFactor(layer, rank[0], device="meta")
    if isinstance(layer, nn.Embedding):
        return TwoFactorEmbedding(layer, rank[0], device="meta")
    if isinstance(layer, nn.Linear):
        return TwoFactorLinear(layer, rank[0], device="meta")
    return TwoFactorConvolution(layer, rank[0], device="meta")
