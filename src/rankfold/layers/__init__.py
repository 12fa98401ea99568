"""Factorized layers, built from torch's own modules so that every tool for torch knows them.

Each is an `nn.Sequential` of convolutions or linear layers with nothing between them, has the
geometry (stride, padding, dilation, bias, dtype) of one dense layer, and `to_dense()` gives that
layer back. How the factors are found is the business of `rankfold.methods`.
"""

from rankfold.layers.chain import CONVOLUTIONS, Convolution, axis_groups
from rankfold.layers.fixed_basis import FixedBasisConvolution
from rankfold.layers.flattened import FlattenedConvolution
from rankfold.layers.form import Dense, Form, assign_factors, check_ranks
from rankfold.layers.separable import (
    SeparableBottleneck,
    SeparableConvolution,
    separable_limit,
    split_kernel,
)
from rankfold.layers.separable_basis import SeparableBasisConvolution
from rankfold.layers.tucker import TuckerConvolution
from rankfold.layers.two_factor import TwoFactorConvolution, TwoFactorLinear

__all__ = [
    "CONVOLUTIONS",
    "Convolution",
    "Dense",
    "FixedBasisConvolution",
    "FlattenedConvolution",
    "Form",
    "SeparableBasisConvolution",
    "SeparableBottleneck",
    "SeparableConvolution",
    "TuckerConvolution",
    "TwoFactorConvolution",
    "TwoFactorLinear",
    "assign_factors",
    "axis_groups",
    "check_ranks",
    "separable_limit",
    "split_kernel",
]
