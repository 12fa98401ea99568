import pytest
import torch
from geometry import relative
from tensors import tensor_of, weight_of
from torch import nn

from rankfold.cost import count_layer_macs, count_parameters
from rankfold.layers import TuckerCPConvolution
from rankfold.methods import METHODS, WEIGHT_METRIC, Moments

METHOD = METHODS["tucker-cp"]()


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(
    ("layer", "rank"), [(nn.Conv1d(14, 12, 5), 4), (nn.Conv2d(12, 14, 3), 5)], ids=str
)
def test_a_kernel_of_these_ranks_is_recovered(layer, rank, known) -> None:
    form = TuckerCPConvolution(layer.double(), (rank, 4))
    with torch.no_grad():
        for seed, one in enumerate(form):
            one.weight.copy_(tensor_of(one.weight.shape, seed=seed))
    exact = form.to_dense()
    moments = WEIGHT_METRIC
    if known:
        moments = Moments(weight_of(exact.weight[0].numel(), 1), weight_of(len(exact.weight), 2))
    family = METHOD.fit(exact, moments)
    assert relative(family.build((rank, 4)).to_dense().weight, exact.weight) < 1e-3
    assert relative(family.build((3, 4)).to_dense().weight, exact.weight) > 1e-2
    assert relative(family.build((rank, 3)).to_dense().weight, exact.weight) > 1e-2


def test_with_all_channels_it_is_cp() -> None:
    layer = nn.Conv2d(12, 10, 3, dtype=torch.float64)
    ours = METHOD.fit(layer, WEIGHT_METRIC).build((16, 12)).to_dense().weight
    cp = METHODS["cp"]().fit(layer, WEIGHT_METRIC).build((16,)).to_dense().weight
    error = relative(cp, layer.weight)
    assert relative(ours, layer.weight) == pytest.approx(error, rel=0.05)


def test_it_is_no_better_than_tucker2_of_this_width() -> None:
    layer = nn.Conv2d(16, 16, 3, dtype=torch.float64)
    bound = METHODS["tucker2"]().fit(layer, WEIGHT_METRIC).build((8, 8)).to_dense().weight
    family = METHOD.fit(layer, WEIGHT_METRIC)
    bound = relative(bound, layer.weight)
    exact = relative(family.build((64, 8)).to_dense().weight, layer.weight)
    assert exact == pytest.approx(bound, rel=1e-3)  # 64 terms: any 8x8x9 core
    assert relative(family.build((16, 8)).to_dense().weight, layer.weight) > 1.01 * bound


def test_costs_by_hand() -> None:
    layer = nn.Conv2d(8, 6, 3, stride=2, padding=1, bias=False)
    narrow, wide = (METHOD.skeleton(layer, (10, width)) for width in (4, 7))
    shape = [(1, 8, 10, 10)]  # 5x5 outputs
    assert count_parameters(narrow) == 8 * 4 + 4 * 10 + 9 * 10 + 10 * 4 + 4 * 6
    assert count_layer_macs(narrow, shape) == (32 + 40) * 100 + (90 + 40 + 24) * 25
    # There are but 6 outputs: their side of the bottleneck is no wider.
    assert count_parameters(wide) == 8 * 7 + 7 * 10 + 9 * 10 + 10 * 6 + 6 * 6


def test_compiles_exports_and_round_trips_like_any_module() -> None:
    layer = nn.Conv2d(8, 16, 3, padding=1, stride=(2, 1), dilation=(1, 2))
    form = METHOD.fit(layer, WEIGHT_METRIC).build((16, 8)).eval()
    inputs = torch.randn(2, 8, 7, 7)
    torch.testing.assert_close(torch.export.export(form, (inputs,)).module()(inputs), form(inputs))
    other = TuckerCPConvolution(layer, (16, 8)).eval()
    other.load_state_dict(form.state_dict())
    assert torch.equal(other(inputs), form(inputs))
    assert form[2].stride == (2, 1) and form[2].dilation == (1, 2)
