"""A convolution's kernel in coordinates of its channels in which all errors count the same."""

from dataclasses import dataclass
from functools import cached_property

import torch

from rankfold.decompose.decomposition import working_precision
from rankfold.decompose.weights import Whitening
from rankfold.layers import Convolution
from rankfold.methods.moments import Moments

CHANNELS = (0, 1)  # modes of a kernel (out, in, places)


@dataclass(frozen=True, eq=False)
class WhitenedKernel:
    """One layer in a metric, of which the part that concerns the channels is whitened away."""

    layer: Convolution
    moments: Moments

    @cached_property
    def tensor(self) -> torch.Tensor:
        """(out, in, places), float64."""
        return working_precision(self.layer.weight.detach()).double().flatten(2)

    @cached_property
    def whitening(self) -> Whitening:
        channels = self.moments.of_channels(self.layer.in_channels)
        known = zip(CHANNELS, (channels.gradients, channels.inputs), strict=True)
        weights = {mode: moment for mode, moment in known if moment is not None}
        return Whitening.of(self.tensor.shape, weights)

    @cached_property
    def whitened(self) -> torch.Tensor:
        return self.whitening.whiten(self.tensor)
