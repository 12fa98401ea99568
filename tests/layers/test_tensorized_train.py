"""Channels that are split into several modes."""

import pytest
import torch
from tensors import tensor_of
from torch import nn

from rankfold.decompose import tensor_train_matrix
from rankfold.errors import RankError
from rankfold.layers import TensorizedTrainConvolution, channel_modes, tensorized_limits
from rankfold.layers.modes import balanced_modes
from rankfold.layers.tensorized_train import TrainCore, train_matrices


@pytest.mark.parametrize(
    ("length", "count", "modes"),
    [
        (64, 2, (8, 8)),
        (64, 3, (4, 4, 4)),
        (512, 2, (16, 32)),
        (48, 3, (3, 4, 4)),
        (17, 2, (1, 17)),
        (1, 3, (1, 1, 1)),
        (12, 1, (12,)),
    ],
)
def test_modes_are_of_about_one_length(length, count, modes) -> None:
    assert balanced_modes(length, count) == modes


def test_pairs_are_of_about_one_size() -> None:
    assert channel_modes(nn.Conv2d(20, 24, 3), 2) == [(6, 4), (4, 5)]
    assert channel_modes(nn.Conv2d(3, 64, 3), 2) == [(8, 1), (8, 3)]


def test_no_rank_is_greater_than_what_makes_it_exact() -> None:
    layer = nn.Conv2d(16, 16, 3)
    assert tensorized_limits(layer, [(4, 4), (4, 4)]) == (9, 16)
    form = TensorizedTrainConvolution(layer, [(4, 4), (4, 4)], 12)
    spatial, first, second, _ = form
    assert spatial.layer.out_channels == 9
    assert (first.layer.in_channels, first.layer.out_channels) == (4 * 9, 4 * 12)
    assert (second.layer.in_channels, second.layer.out_channels) == (4 * 12, 4)
    for rank in (0, 17):
        with pytest.raises(RankError, match=r"1\.\.16"):
            TensorizedTrainConvolution(layer, [(4, 4), (4, 4)], rank)


@pytest.mark.parametrize("rows", [(2, 3, 4), (3, 1, 2)])
@pytest.mark.parametrize("columns", [(4, 2, 3), (1, 5, 2)])
def test_cores_multiply_by_a_tt_matrix(rows, columns) -> None:
    """Beside the decomposition's own form, as cores of a linear layer, in any leading modes."""
    outputs, inputs = torch.Size(rows).numel(), torch.Size(columns).numel()
    train = tensor_train_matrix(tensor_of((outputs, inputs)), rows, columns, 3)
    cores, others = nn.Sequential(), inputs
    for core, made, given in zip(train.cores, rows, columns, strict=True):
        before, _, _, after = core.shape
        product = nn.Linear(given * before, made * after, bias=False, dtype=torch.float64)
        weight = core.permute(1, 3, 2, 0).reshape(product.weight.shape)
        product.weight = nn.Parameter(weight)
        others //= given
        cores.append(TrainCore(product, (made, given), others))
        others *= made
    matrix = train.to_tensor()
    given = tensor_of((2, 3, inputs), seed=1)
    torch.testing.assert_close(cores(given), given @ matrix.mT)
    torch.testing.assert_close(train_matrices(list(cores))[0], matrix)


def test_the_kernel_is_the_product_of_the_cores() -> None:
    """Garipov et al. 2016, equation 9, entry by entry."""
    layer = nn.Conv1d(6, 4, 3, dtype=torch.float64)
    form = TensorizedTrainConvolution(layer, [(2, 2), (2, 3)], 3)
    filters = form[0].layer.weight[:, 0]
    first, second = (one.core() for one in list(form)[1:3])
    kernel = form.to_dense().weight
    for o, i, x in [(0, 0, 0), (3, 5, 2), (1, 4, 1), (2, 2, 0)]:
        # Of 6 inputs as 2 x 3, of 4 outputs as 2 x 2; cores are (out, after, in, before).
        left = first[o // 2, :, i // 3, :] @ filters[:, x]
        torch.testing.assert_close(kernel[o, i, x], second[o % 2, 0, i % 3, :] @ left)


def test_the_bias_comes_last_and_starts_from_nothing() -> None:
    form = TensorizedTrainConvolution(nn.Conv2d(4, 6, 3), [(2, 2), (3, 2)], 2)
    given = torch.randn(1, 4, 5, 5)
    assert not form[-1].bias.any()
    before = form(given)
    with torch.no_grad():
        form[-1].bias.copy_(torch.arange(6.0))
    expected = before + torch.arange(6.0)[:, None, None]
    torch.testing.assert_close(form(given), expected)
    without = TensorizedTrainConvolution(nn.Conv2d(4, 6, 3, bias=False), [(2, 2), (3, 2)], 2)
    assert without[-1].bias is None and without(given).shape == (1, 6, 3, 3)
