"""Factorized layers, built from torch's own modules so that every tool for torch knows them.

Each is an `nn.Sequential` of convolutions or linear layers with nothing between them, has the
geometry (stride, padding, dilation, bias, dtype) of one dense layer, and `to_dense()` gives that
layer back. How the factors are found is the business of `rankfold.methods`.
"""

from rankfold.layers.chain import CONVOLUTIONS, Convolution
from rankfold.layers.cp import CPConvolution, cp_limit, cp_modes
from rankfold.layers.form import Dense, Form, assign_factors, check_ranks
from rankfold.layers.tucker import TuckerConvolution
from rankfold.layers.two_factor import TwoFactorConvolution, TwoFactorLinear

__all__ = [
    "CONVOLUTIONS",
    "CPConvolution",
    "Convolution",
    "Dense",
    "Form",
    "TuckerConvolution",
    "TwoFactorConvolution",
    "TwoFactorLinear",
    "assign_factors",
    "check_ranks",
    "cp_limit",
    "cp_modes",
]
