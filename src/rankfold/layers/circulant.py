"""Linear layers whose weight is the same along its diagonals: circulant, Toeplitz, Hankel."""

import torch
from torch import nn

from rankfold.layers.fourier import (
    FourierLinear,
    Spectra,
    fast_length,
    random_phases,
    toeplitz,
    transformable,
)


class CirculantLinear(FourierLinear):
    """W[i, j] = c[(i - j) mod n], n = max(in, out).

    Cheng, Yu, Feris, Kumar, Choudhary, Chang: An exploration of parameter redundancy in deep
    networks with circulant projections. ICCV 2015. Of unequal sides the weight is the corner of the
    square matrix: inputs are padded with zeros, or outputs cut.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.period = self._period(in_features, out_features)
        enough = fast_length(in_features + out_features - 1)
        self.transformed = self.period if fast_length(self.period) == self.period else enough
        super().__init__(in_features, out_features, [[self.period]], bias, device, dtype)

    @staticmethod
    def _period(in_features: int, out_features: int) -> int:
        """The size of the circulant matrix of which the weight is a corner."""
        return max(in_features, out_features)

    def spectra(self) -> Spectra:
        (numbers,) = map(transformable, self.factors)
        if self.transformed != self.period:
            # A longer period for the same corner: what lies between its diagonals is not met.
            behind = numbers[self.period - self.in_features + 1 :]
            between = self.transformed - self.out_features - len(behind)
            ahead = nn.functional.pad(numbers[: self.out_features], (0, between))
            numbers = torch.cat([ahead, behind])
        return (torch.fft.rfft(numbers),)

    def filtered(self, rows: torch.Tensor, spectra: Spectra) -> torch.Tensor:
        made = torch.fft.rfft(rows, self.transformed) * spectra[0]
        return torch.fft.irfft(made, self.transformed)[:, : self.out_features]

    def to_weight(self) -> torch.Tensor:
        (numbers,) = self.factors
        behind = numbers[self.period - self.in_features + 1 :]
        return toeplitz(torch.cat([behind, numbers[: self.out_features]]), self.in_features)

    @torch.no_grad()
    def reset_parameters(self, gain: float = 1.0) -> None:
        """A random weight whose entries have mean 0 and variance gain² / in; zero bias.

        The circulant matrix is a multiple of an orthogonal one.
        """
        (numbers,) = self.factors
        scale = gain * (self.period / self.in_features) ** 0.5
        numbers.copy_(scale * random_phases(self.period, numbers))
        if self._bias is not None:
            nn.init.zeros_(self._bias)


class ToeplitzLinear(CirculantLinear):
    """W[i, j] = t[i - j], of in + out - 1 numbers: the column from the corner on, then the row.

    The corner of a circulant matrix whose period is so long that no diagonal is met twice: the row
    is t[1 - in], ..., t[-1].
    """

    @staticmethod
    def _period(in_features: int, out_features: int) -> int:
        return in_features + out_features - 1


class HankelLinear(ToeplitzLinear):
    """W[i, j] = h[i + j], of in + out - 1 numbers: a Toeplitz matrix of the inputs turned round.

    The numbers are those of that matrix: h[in - 1], ..., h[in + out - 2], then h[0], ....
    """

    def filtered(self, rows: torch.Tensor, spectra: Spectra) -> torch.Tensor:
        return super().filtered(rows.flip(-1), spectra)

    def to_weight(self) -> torch.Tensor:
        return super().to_weight().flip(-1)
