"""Linear layers that are multiplied by fast Fourier transforms, in O(n log n)."""

from typing import Any

import scipy
import torch
from torch import nn

from rankfold.layers.structured_linear import StructuredLinear

Spectra = tuple[torch.Tensor, ...]


class FourierLinear(StructuredLinear):
    """y = W x + b, W made of matrices that are diagonal after Fourier transforms.

    A subclass transforms its factors (`spectra`) and filters rows of inputs by them (`filtered`).
    Transforms are in float32 at least, whatever the dtype of the layer.

    At first matrices are near multiples of orthogonal ones. But what all inputs have in common,
    such as an offset behind a ReLU, all outputs have in common too: several such layers with
    nothing but ReLUs between keep their scale in the mean over draws alone.

    For few rows the transforms of the factors take as long as those of the rows:
    `keep_spectra(True)` has a layer in eval mode make them once, and keep them until it is trained.
    """

    keeps_spectra = False
    kept: Spectra | None = None

    def spectra(self) -> Spectra:
        """What the factors are multiplied by in the domain of frequencies, differentiable."""
        raise NotImplementedError

    def filtered(self, rows: torch.Tensor, spectra: Spectra) -> torch.Tensor:
        """Rows of inputs times the weight: (n, in) to (n, out), n > 0, float32 or float64."""
        raise NotImplementedError

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        if rows.shape[0] == 0:  # of nothing there are no transforms
            return rows @ self.to_weight().to(rows.dtype).mT
        return self.filtered(transformable(rows), self._spectra()).to(rows.dtype)

    def keep_spectra(self, keeps: bool) -> None:
        """Whether to transform the factors once, in eval mode, or with each product."""
        self.keeps_spectra, self.kept = keeps, None

    def train(self, mode: bool = True) -> "FourierLinear":
        self.kept = None
        super().train(mode)
        return self

    def _spectra(self) -> Spectra:
        if self.kept is not None and not torch.is_grad_enabled():
            return self.kept
        spectra = self.spectra()
        is_passing = self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()
        if self.keeps_spectra and not is_passing:
            self.kept = spectra
        return spectra

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        self.kept = None  # of another device or dtype
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.kept = None
        super()._load_from_state_dict(*args, **kwargs)


def fast_length(length: int) -> int:
    """The least length, not below this one, that has no prime factors above 5."""
    return int(scipy.fft.next_fast_len(length, real=True))


def transformable(tensor: torch.Tensor) -> torch.Tensor:
    """In float32 where torch has no transforms of the dtype."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def toeplitz(numbers: torch.Tensor, columns: int) -> torch.Tensor:
    """The Toeplitz matrix of the numbers (..., rows + columns - 1) on its diagonals.

    The last column comes first: entry (i, j) is number i - j + columns - 1.
    """
    return numbers.unfold(-1, columns, 1).flip(-1)


def random_phases(length: int, like: torch.Tensor) -> torch.Tensor:
    """Random rows, of the shape and device of `like`, whose spectra have modulus 1; float32.

    Circulant matrices of them are orthogonal. Entries have the mean 0 and the variance 1 / length.
    """
    noise = torch.randn(like.shape, device=like.device)
    spectrum = torch.fft.rfft(noise, length)
    return torch.fft.irfft(spectrum / spectrum.abs().clamp_min(1e-12), length)
