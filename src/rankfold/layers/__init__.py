"""Factorized layers, built from torch's own modules so that every tool for torch knows them.

Each is an `nn.Sequential` of convolutions or linear layers with nothing between them, or such a
chain beside another layer (block diagonal), has the geometry (stride, padding, dilation, bias,
dtype) of one dense layer, and `to_dense()` gives that layer back; a recurrent layer is a smaller
one and a readout, and no other layer does the same. How the factors are found is the business of
`rankfold.methods`.
"""

from rankfold.layers.biclustered import BiclusteredConvolution
from rankfold.layers.block_diagonal import (
    BlockDiagonalConvolution,
    BlockDiagonalLinear,
    block_diagonal_limits,
    possible_groups,
)
from rankfold.layers.block_term import BlockTermConvolution, block_term_limit, block_widths
from rankfold.layers.chain import CONVOLUTIONS, Convolution, axis_groups
from rankfold.layers.cp import CPConvolution, cp_limit, cp_modes
from rankfold.layers.fixed_basis import FixedBasisConvolution
from rankfold.layers.flattened import FlattenedConvolution
from rankfold.layers.form import Dense, Form, assign_factors, check_ranks, factors_of
from rankfold.layers.grouped import GroupedConvolution
from rankfold.layers.monochromatic import MonochromaticConvolution
from rankfold.layers.recurrent import (
    RECURRENT,
    FewerUnits,
    Recurrent,
    block_names,
    directions_of,
)
from rankfold.layers.selected import ChannelSelection, SelectedChannels
from rankfold.layers.separable import (
    SeparableBottleneck,
    SeparableConvolution,
    separable_limit,
    split_kernel,
)
from rankfold.layers.separable_basis import SeparableBasisConvolution
from rankfold.layers.tensor_ring import TensorRingConvolution
from rankfold.layers.tensor_train import TensorTrainConvolution, train_limits, train_modes
from rankfold.layers.tensorized_train import (
    TensorizedTrainConvolution,
    channel_modes,
    tensorized_limits,
)
from rankfold.layers.transposed import (
    TRANSPOSED,
    Transposed,
    TransposedConvolution,
    adjoint_weights,
)
from rankfold.layers.tucker import TuckerConvolution
from rankfold.layers.tucker_cp import TuckerCPConvolution, tucker_cp_limits
from rankfold.layers.two_factor import TwoFactorConvolution, TwoFactorLinear

__all__ = [
    "CONVOLUTIONS",
    "RECURRENT",
    "TRANSPOSED",
    "BiclusteredConvolution",
    "BlockDiagonalConvolution",
    "BlockDiagonalLinear",
    "BlockTermConvolution",
    "CPConvolution",
    "ChannelSelection",
    "Convolution",
    "Dense",
    "FewerUnits",
    "FixedBasisConvolution",
    "FlattenedConvolution",
    "Form",
    "GroupedConvolution",
    "MonochromaticConvolution",
    "Recurrent",
    "SelectedChannels",
    "SeparableBasisConvolution",
    "SeparableBottleneck",
    "SeparableConvolution",
    "TensorRingConvolution",
    "TensorTrainConvolution",
    "TensorizedTrainConvolution",
    "Transposed",
    "TransposedConvolution",
    "TuckerCPConvolution",
    "TuckerConvolution",
    "TwoFactorConvolution",
    "TwoFactorLinear",
    "adjoint_weights",
    "assign_factors",
    "axis_groups",
    "block_diagonal_limits",
    "block_names",
    "block_term_limit",
    "block_widths",
    "channel_modes",
    "check_ranks",
    "cp_limit",
    "cp_modes",
    "directions_of",
    "factors_of",
    "possible_groups",
    "separable_limit",
    "split_kernel",
    "tensorized_limits",
    "train_limits",
    "train_modes",
    "tucker_cp_limits",
]
