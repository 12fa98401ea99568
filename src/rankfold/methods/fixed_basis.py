"""Filters that are known beforehand on every input channel; only their mixture is the layer's.

The discrete cosine transform as Ulicny, Krylov, Dahyot: Harmonic networks for image classification
(BMVC 2019) use it, with the first of its functions by frequency; or orthogonal wavelets, Haar's or
those that PyWavelets knows (Daubechies: Orthonormal bases of compactly supported wavelets, 1988).
The mixture has a closed form in every metric.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from itertools import product
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from rankfold.decompose.decomposition import working_precision
from rankfold.layers import Convolution, FixedBasisConvolution, assign_factors, check_ranks
from rankfold.methods.method import Rank, Spectrum, check_alignment, why_not_spatial
from rankfold.methods.mixture import best_mixture, errors_by_filter
from rankfold.methods.moments import Moments

try:
    import pywt
except ImportError:  # an extra
    pywt = None


@dataclass(frozen=True)
class FixedBasis:
    """K[o, i] ≈ Σ_m a[o, i, m] b[m]: depthwise kxk with the first functions b of a basis, 1x1.

    Takes ungrouped convolutions with a kernel larger than 1x1. `basis` is "dct", "haar", or with
    PyWavelets (the extra `wavelets`) the name of an orthogonal wavelet, "db2" or "sym4"; for
    wavelets all lengths of the kernel are powers of 2. The rank is the number of functions, from
    those of the lowest frequency on; every number is a candidate, because the channels keep their
    alignment. The functions are parameters without a gradient.
    """

    name: ClassVar[str] = "fixed-basis"
    alignment: int = 8
    basis: str = "dct"

    def __post_init__(self) -> None:
        check_alignment(self.alignment)
        _check_basis(self.basis)

    def why_not(self, layer: nn.Module) -> str | None:
        if (reason := why_not_spatial(layer)) is not None:
            return reason
        lengths = layer.get_parameter("weight").shape[2:]
        if self.basis != "dct" and any(length & (length - 1) for length in lengths):
            size = "x".join(map(str, lengths))
            return f"a kernel of {size}: the basis {self.basis} takes lengths that are powers of 2"
        return None

    def fit(self, layer: Convolution, moments: Moments) -> "FixedBasisFamily":
        working_precision(layer.weight.detach())  # raises for NaN and infinity
        return FixedBasisFamily(layer, basis_functions(self.basis, layer.kernel_size), moments)

    def skeleton(self, layer: Convolution, rank: Rank) -> nn.Sequential:
        check_ranks(rank, (math.prod(layer.kernel_size),), layer)
        filters = torch.empty(rank[0], *layer.kernel_size, device="meta")
        return FixedBasisConvolution(layer, filters, device="meta")


@dataclass(frozen=True)
class FixedBasisFamily:
    """The best mixtures of the first functions of a basis."""

    layer: Convolution
    functions: torch.Tensor  # (kernel size, *kernel), float64, orthonormal
    moments: Moments

    @property
    def spectra(self) -> Sequence[Spectrum]:
        return ()

    def ranks(self) -> Sequence[Rank]:
        return [(rank,) for rank in range(1, len(self.functions) + 1)]

    @property
    def _weight(self) -> torch.Tensor:
        """(out, in, kernel size), float64."""
        return self.layer.weight.detach().double().flatten(2)

    @cached_property
    def _losses(self) -> torch.Tensor:
        """Of each rank from 1 on: (full rank,)."""
        filters = self.functions.flatten(1)[:, None].to(self._weight)
        lost = errors_by_filter(self._weight, filters, self.moments)
        return self.moments.loss_of(lost, self._weight)

    def loss(self, rank: Rank) -> float:
        check_ranks(rank, (len(self.functions),), self.layer)
        return self._losses[rank[0] - 1].item()

    def build(self, rank: Rank) -> nn.Sequential:
        check_ranks(rank, (len(self.functions),), self.layer)
        functions = self.functions[: rank[0]]
        filters = functions.flatten(1)[:, None].to(self._weight)
        mixture = best_mixture(self._weight, filters, self.moments)
        form = FixedBasisConvolution(self.layer, functions, device="meta")
        fixed = functions.repeat(self.layer.in_channels, *(1 for _ in self.layer.kernel_size))
        assign_factors(form, (fixed, mixture.mT), self.layer)
        return form


def basis_functions(basis: str, lengths: Sequence[int]) -> torch.Tensor:
    """The products of orthonormal functions along each axis: (product of lengths, *lengths).

    Ordered by frequency, the sum of those along the axes. Float64.
    """
    known = {"dct": _cosines, "haar": _haar}
    along = [known.get(basis, partial(_wavelets, basis))(n) for n in lengths]
    frequencies = sorted(product(*map(range, lengths)), key=lambda f: (sum(f), f))
    return torch.stack(
        [
            reduce(
                lambda left, right: left[..., None] * right,
                (functions[f] for functions, f in zip(along, each, strict=True)),
            )
            for each in frequencies
        ]
    )


def _cosines(length: int) -> torch.Tensor:
    """The orthonormal DCT-II, (frequency, place)."""
    places = torch.arange(length, dtype=torch.float64) + 0.5
    angles = torch.outer(torch.arange(length, dtype=torch.float64), places) * math.pi / length
    return nn.functional.normalize(angles.cos(), dim=1)


def _haar(length: int) -> torch.Tensor:
    """The orthonormal Haar wavelets, (scale and shift, place), of a power of 2, coarsest first."""
    functions = torch.ones(1, 1, dtype=torch.float64)
    while len(functions) < length:
        identity = torch.eye(len(functions), dtype=torch.float64)
        coarse = torch.kron(functions, torch.ones(1, 2, dtype=torch.float64))
        fine = torch.kron(identity, torch.tensor([[1.0, -1.0]], dtype=torch.float64))
        functions = torch.cat([coarse, fine]) / math.sqrt(2)
    return functions


def _wavelets(name: str, length: int) -> torch.Tensor:
    """Likewise those of another orthogonal wavelet, which go round the places."""
    level = length.bit_length() - 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that wavelets go round: they are to
        bands = pywt.wavedec(np.eye(length), name, mode="periodization", level=level)
    return torch.from_numpy(np.concatenate(bands, axis=1).T.copy())


def _check_basis(basis: str) -> None:
    if basis in ("dct", "haar"):
        return
    if pywt is None:
        raise ValueError(
            "the bases are dct, haar, and wavelets where PyWavelets is installed (pip install "
            f"'rankfold[wavelets]'), not {basis!r:.40}"
        )
    if not isinstance(basis, str) or basis not in pywt.wavelist(kind="discrete"):
        raise ValueError(f"the bases are dct, haar and PyWavelets' wavelets, not {basis!r:.40}")
    if not pywt.Wavelet(basis).orthogonal:
        raise ValueError(f"the wavelet {basis} is not orthogonal")
