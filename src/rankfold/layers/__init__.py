"""Factorized layers, built from torch's own modules so that every tool for torch knows them.

Each is an `nn.Sequential` of convolutions or linear layers with nothing between them, or such a
chain beside another layer (block diagonal), has the geometry (stride, padding, dilation, bias,
dtype) of one dense layer, and `to_dense()` gives that layer back; a recurrent layer is a smaller
one and a readout, and no other layer does the same. How the factors are found is the business of
`rankfold.methods`.
"""

from rankfold.layers.attention import PROJECTIONS, UnfusedAttention
from rankfold.layers.balance import balance_factors
from rankfold.layers.biclustered import BiclusteredConvolution
from rankfold.layers.block_diagonal import (
    BlockDiagonalConvolution,
    BlockDiagonalLinear,
    block_diagonal_limits,
    possible_groups,
)
from rankfold.layers.block_term import BlockTermConvolution, block_term_limit, block_widths
from rankfold.layers.block_term_linear import BlockTermLinear
from rankfold.layers.chain import CONVOLUTIONS, Convolution, axis_groups
from rankfold.layers.chain_norm import squared_norm_of_chain
from rankfold.layers.circulant import CirculantLinear, HankelLinear, ToeplitzLinear
from rankfold.layers.cp import CPConvolution, cp_limit, cp_modes
from rankfold.layers.cp_linear import CPLinear
from rankfold.layers.embedding import TiedLayers, TiedTwoFactor, TwoFactorEmbedding
from rankfold.layers.fixed_basis import FixedBasisConvolution
from rankfold.layers.flattened import FlattenedConvolution
from rankfold.layers.form import (
    Dense,
    Form,
    assign_factors,
    check_ranks,
    factors_of,
    parameter_like,
)
from rankfold.layers.from_scratch import (
    FlattenedConv2d,
    LowRankConv2d,
    LowRankLinear,
    SeparableConv2d,
)
from rankfold.layers.fused import FusedTwoFactorLinear
from rankfold.layers.grouped import GroupedConvolution
from rankfold.layers.hollow import HollowLayer
from rankfold.layers.kronecker import KroneckerLinear
from rankfold.layers.modes import balanced_modes, modes_of, paired_modes
from rankfold.layers.monarch import MonarchLinear, balanced_blocks, block_lengths
from rankfold.layers.monochromatic import MonochromaticConvolution
from rankfold.layers.projected_inputs import ProjectedInputs
from rankfold.layers.recurrent import (
    CELLS,
    RECURRENT,
    Cell,
    FewerUnits,
    FewerUnitsCell,
    ProjectedUnits,
    Recurrent,
    ReducedStates,
    block_names,
    directions_of,
    input_limit,
    recurrent_weight,
)
from rankfold.layers.selected import ChannelSelection, SelectedChannels
from rankfold.layers.separable import (
    SeparableBottleneck,
    SeparableConvolution,
    separable_limit,
    split_kernel,
)
from rankfold.layers.separable_basis import SeparableBasisConvolution
from rankfold.layers.structured_linear import StructuredLinear
from rankfold.layers.structured_recurrent import StructuredRecurrent
from rankfold.layers.tensor_network import TensorNetworkLinear
from rankfold.layers.tensor_ring import TensorRingConvolution
from rankfold.layers.tensor_ring_linear import TensorRingLinear, ring_limits
from rankfold.layers.tensor_train import TensorTrainConvolution, train_limits, train_modes
from rankfold.layers.tensor_train_embedding import TensorTrainEmbedding, table_modes
from rankfold.layers.tensor_train_linear import (
    TensorTrainLinear,
    train_limits_of,
    train_matrix_limits,
)
from rankfold.layers.tensorized_train import (
    TensorizedTrainConvolution,
    channel_modes,
    tensorized_limits,
)
from rankfold.layers.toeplitz_like import ToeplitzLikeLinear, square_size
from rankfold.layers.transposed import (
    TRANSPOSED,
    Transposed,
    TransposedConvolution,
    adjoint_weights,
)
from rankfold.layers.transposed_linear import (
    TransposedLinear,
    as_linear,
    has_features_last,
    is_transposed_linear,
)
from rankfold.layers.tucker import TuckerConvolution
from rankfold.layers.tucker_cp import TuckerCPConvolution, tucker_cp_limits
from rankfold.layers.tucker_linear import TuckerLinear
from rankfold.layers.two_factor import TwoFactorConvolution, TwoFactorLinear

__all__ = [
    "CELLS",
    "CONVOLUTIONS",
    "PROJECTIONS",
    "RECURRENT",
    "TRANSPOSED",
    "BiclusteredConvolution",
    "BlockDiagonalConvolution",
    "BlockDiagonalLinear",
    "BlockTermConvolution",
    "BlockTermLinear",
    "CPConvolution",
    "CPLinear",
    "Cell",
    "ChannelSelection",
    "CirculantLinear",
    "Convolution",
    "Dense",
    "FewerUnits",
    "FewerUnitsCell",
    "FixedBasisConvolution",
    "FlattenedConv2d",
    "FlattenedConvolution",
    "Form",
    "FusedTwoFactorLinear",
    "GroupedConvolution",
    "HankelLinear",
    "HollowLayer",
    "KroneckerLinear",
    "LowRankConv2d",
    "LowRankLinear",
    "MonarchLinear",
    "MonochromaticConvolution",
    "ProjectedInputs",
    "ProjectedUnits",
    "Recurrent",
    "ReducedStates",
    "SelectedChannels",
    "SeparableBasisConvolution",
    "SeparableBottleneck",
    "SeparableConv2d",
    "SeparableConvolution",
    "StructuredLinear",
    "StructuredRecurrent",
    "TensorNetworkLinear",
    "TensorRingConvolution",
    "TensorRingLinear",
    "TensorTrainConvolution",
    "TensorTrainEmbedding",
    "TensorTrainLinear",
    "TensorizedTrainConvolution",
    "TiedLayers",
    "TiedTwoFactor",
    "ToeplitzLikeLinear",
    "ToeplitzLinear",
    "Transposed",
    "TransposedConvolution",
    "TransposedLinear",
    "TuckerCPConvolution",
    "TuckerConvolution",
    "TuckerLinear",
    "TwoFactorConvolution",
    "TwoFactorEmbedding",
    "TwoFactorLinear",
    "UnfusedAttention",
    "adjoint_weights",
    "as_linear",
    "assign_factors",
    "axis_groups",
    "balance_factors",
    "balanced_blocks",
    "balanced_modes",
    "block_diagonal_limits",
    "block_lengths",
    "block_names",
    "block_term_limit",
    "block_widths",
    "channel_modes",
    "check_ranks",
    "cp_limit",
    "cp_modes",
    "directions_of",
    "factors_of",
    "has_features_last",
    "input_limit",
    "is_transposed_linear",
    "modes_of",
    "paired_modes",
    "parameter_like",
    "possible_groups",
    "recurrent_weight",
    "ring_limits",
    "separable_limit",
    "split_kernel",
    "square_size",
    "squared_norm_of_chain",
    "table_modes",
    "tensorized_limits",
    "train_limits",
    "train_limits_of",
    "train_matrix_limits",
    "train_modes",
    "tucker_cp_limits",
]
