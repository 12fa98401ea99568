"""A convolution as any chain of links, each with some axes of the kernel to itself, or none."""

from typing import cast

from torch import nn

from rankfold.layers.chain import Convolution, dense_convolution, kernel_of


class LinkedConvolution(nn.Sequential):
    """Convolutions with nothing between them, no two of which share an axis of the kernel."""

    groups = 1  # of the dense layer

    def to_dense(self) -> Convolution:
        """The `nn.Conv1d`, `2d` or `3d` that this represents."""
        links = [cast(Convolution, one) for one in self]
        weight = kernel_of([(one.weight, one.groups) for one in links], self.groups)
        return dense_convolution(self, weight, self.groups)
