"""Factorized layers, built from torch's own modules so that every tool for torch knows them.

Each is an `nn.Sequential` of convolutions or linear layers with nothing between them, has the
geometry (stride, padding, dilation, bias, dtype) of one dense layer, and `to_dense()` gives that
layer back. How the factors are found is the business of `rankfold.methods`.
"""

from rankfold.layers.block_term import BlockTermConvolution, block_term_limit, block_widths
from rankfold.layers.chain import CONVOLUTIONS, Convolution, axis_groups
from rankfold.layers.cp import CPConvolution, cp_limit, cp_modes
from rankfold.layers.form import Dense, Form, assign_factors, check_ranks
from rankfold.layers.tensor_train import TensorTrainConvolution, train_limits, train_modes
from rankfold.layers.tucker import TuckerConvolution
from rankfold.layers.tucker_cp import TuckerCPConvolution, tucker_cp_limits
from rankfold.layers.two_factor import TwoFactorConvolution, TwoFactorLinear

__all__ = [
    "CONVOLUTIONS",
    "BlockTermConvolution",
    "CPConvolution",
    "Convolution",
    "Dense",
    "Form",
    "TensorTrainConvolution",
    "TuckerCPConvolution",
    "TuckerConvolution",
    "TwoFactorConvolution",
    "TwoFactorLinear",
    "assign_factors",
    "axis_groups",
    "block_term_limit",
    "block_widths",
    "check_ranks",
    "cp_limit",
    "cp_modes",
    "train_limits",
    "train_modes",
    "tucker_cp_limits",
]
