"""Linear layers whose weight is a sum of products of a circulant and a skew-circulant matrix."""

import math

import torch
from torch import nn

from rankfold.errors import RankError
from rankfold.layers.fourier import (
    FourierLinear,
    Spectra,
    fast_length,
    random_phases,
    transformable,
)


class ToeplitzLikeLinear(FourierLinear):
    """W = Σ_j Z₁(g_j) Z₋₁(h_j): circulant of the columns g_j, skew-circulant of the columns h_j.

    Sindhwani, Sainath, Kumar: Structured transforms for small-footprint deep learning. NeurIPS
    2015, equation 4. The weight is the corner, (out, in), of such a square matrix, whose size is
    the first even one from max(in, out) on that is quick to transform: inputs are padded with
    zeros, and outputs cut. The factors are all g_j, (rank, size), and all h_j.

    A row takes 2 rank + 2 transforms of real vectors: one for all skew-circulant products there and
    one for each back, one for each circulant product there and one for their sum back.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Of so many terms as `rank` says; RankError below 1 or above the size of the square."""
        self.size = square_size(in_features, out_features)
        if not 1 <= rank <= self.size:
            raise RankError(f"rank {rank} is outside 1..{self.size}")
        shapes = [[rank, self.size]] * 2
        super().__init__(in_features, out_features, shapes, bias, device, dtype)

    def spectra(self) -> Spectra:
        circulant, skew = map(transformable, self.factors)
        twist = twist_of(self.size // 2, self.size, skew)
        return twist, torch.fft.rfft(circulant), _skew_spectrum(skew, twist)

    def filtered(self, rows: torch.Tensor, spectra: Spectra) -> torch.Tensor:
        twist, circulant, skew = spectra
        padding = self.size - self.in_features
        padded = nn.functional.pad(rows, (0, padding)) if padding else rows
        between = _of_skew_spectrum(_skew_spectrum(padded, twist)[:, None] * skew, twist)
        summed = (torch.fft.rfft(between) * circulant).sum(1)
        return torch.fft.irfft(summed, self.size)[:, : self.out_features]

    def to_weight(self) -> torch.Tensor:
        circulant, skew = map(transformable, self.factors)
        twist = twist_of(self.size, self.size, skew)
        between = between_domains(self.size // 2 + 1, self.size, twist.real)
        spectra = torch.fft.rfft(circulant), torch.fft.fft(skew * twist)
        square = weight_of_spectra(*spectra, twist, between)
        return square[: self.out_features, : self.in_features].to(self.factors[0].dtype)

    @torch.no_grad()
    def reset_parameters(self, gain: float = 1.0) -> None:
        """A random weight whose entries have mean 0 and variance gain² / in; zero bias.

        Each term is a multiple of an orthogonal matrix.
        """
        rank = len(self.factors[0])
        scale = (gain**2 * self.size / (self.in_features * rank)) ** 0.25
        circulant, skew = self.factors
        circulant.copy_(scale * random_phases(self.size, circulant))
        noise = torch.randn(skew.shape, device=skew.device)
        twist = twist_of(self.size // 2, self.size, noise)
        spectrum = _skew_spectrum(noise, twist)
        modulus = spectrum.abs().clamp_min(1e-12)
        skew.copy_(scale * _of_skew_spectrum(spectrum / modulus, twist))
        if self._bias is not None:
            nn.init.zeros_(self._bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={len(self.factors[0])}"


def square_size(in_features: int, out_features: int) -> int:
    """The first even size that holds both, half of which is quick to transform."""
    return 2 * fast_length(-(-max(in_features, out_features) // 2))


def weight_of_spectra(
    circulant: torch.Tensor, skew: torch.Tensor, twist: torch.Tensor, between: torch.Tensor
) -> torch.Tensor:
    """The square matrix of factors that are transformed, (rank, size / 2 + 1) and (rank, size).

    Between the two domains of frequencies it is Σ_j ĝ_j ĥ_jᵀ, entry by entry times what takes one
    domain to the other (`between_domains`): a product of matrices, and transforms of all rows and
    columns.
    """
    in_frequencies = (circulant.mT @ skew) * between
    return torch.fft.irfft(torch.fft.fft(in_frequencies) * twist, len(twist), dim=0)


def between_domains(rows: int, size: int, like: torch.Tensor) -> torch.Tensor:
    """(rows, size): from the frequencies of Z₋₁ to so many of those of Z₁.

    Entry (a, b) is 2 / size / (1 - exp(iθ)) with θ = -π (1 + 2 (a - b)) / size: the sum of a
    geometric series.
    """
    offsets = torch.arange(rows, device=like.device)[:, None]
    offsets = offsets - torch.arange(size, device=like.device)
    angle = (1 + 2 * offsets).to(like.dtype) * (-math.pi / size)
    # 1 / (1 - exp(iθ)) = (1 + i cot(θ/2)) / 2, without a difference of near numbers.
    cotangent = torch.tan(angle / 2).reciprocal()
    return torch.complex(torch.ones_like(cotangent), cotangent) / size


def twist_of(count: int, size: int, like: torch.Tensor) -> torch.Tensor:
    """exp(iπ t / size), t = 0, 1, ...: what takes Z₋₁ to a multiple of Z₁."""
    angle = torch.arange(count, device=like.device, dtype=like.dtype) * (math.pi / size)
    return torch.polar(torch.ones_like(angle), angle)


def _skew_spectrum(tensor: torch.Tensor, twist: torch.Tensor) -> torch.Tensor:
    """(..., n) real to (..., n / 2) complex: products of these are skew-circulant ones.

    A product of real polynomials modulo zⁿ + 1 is one of complex polynomials of half the length
    modulo z - i, z in the place of its power n / 2. So the second half of the coefficients is the
    imaginary part of the first.
    """
    return torch.fft.fft(torch.complex(*tensor.chunk(2, -1)) * twist)


def _of_skew_spectrum(spectrum: torch.Tensor, twist: torch.Tensor) -> torch.Tensor:
    """(..., n / 2) complex back to (..., n) real."""
    halves = torch.view_as_real(torch.fft.ifft(spectrum) * twist.conj())
    return halves.transpose(-1, -2).flatten(-2)
