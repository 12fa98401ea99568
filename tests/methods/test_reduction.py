"""Grouped and transposed convolutions, reduced to plain ones."""

import pytest
import torch
from geometry import relative
from tensors import tensor_of, weight_of
from torch import nn

import rankfold
from rankfold.cost import count_layer_macs, count_parameters
from rankfold.methods import WEIGHT_METRIC, LowRank, Moments, Tucker2, reduction


class Mixed(nn.Module):
    """A grouped, a depthwise and two transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(32, 48, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(48, 48, 3, padding=1, groups=48)
        self.up = nn.ConvTranspose2d(48, 24, 3, stride=2, padding=1, output_padding=1, bias=False)
        self.up_grouped = nn.ConvTranspose2d(24, 16, 2, stride=2, groups=2)
        self.head = nn.Linear(16, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu_(self.depthwise(torch.relu(self.grouped(images))))
        hidden = self.up_grouped(torch.relu_(self.up(hidden)))
        return self.head(hidden.mean((2, 3)))


def mixed() -> nn.Module:
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = Mixed().eval()
    torch.set_rng_state(state)
    return model


def images() -> list[torch.Tensor]:
    return list(tensor_of((24, 32, 6, 6), torch.float32, seed=1).split(4))


@pytest.mark.parametrize("metric", ["weight", "response", "fisher", "asvd", "fwsvd", "auto"])
def test_from_analysis_to_a_loaded_network(metric, tmp_path) -> None:
    model, data = mixed(), images()
    analysis = rankfold.analyze(model, data, metric=metric)
    reasons = {layer.name: layer.reason for layer in analysis.layers}
    assert "groups=48: depthwise" in reasons["depthwise"]
    analysis.save(tmp_path / "analysis")
    plan = rankfold.Analysis.load(tmp_path / "analysis").plan(macs=0.4)
    factorized = {entry.name for entry in plan.factorized}
    assert {"grouped", "up"} <= factorized and "depthwise" not in factorized
    small = rankfold.factorize(model, plan)
    assert plan.after.macs * len(data[0]) == rankfold.cost.count_macs(lambda: small(data[0]))
    rankfold.save(small, tmp_path / "small")
    loaded = rankfold.load(tmp_path / "small", like=mixed)
    with torch.no_grad():
        assert torch.equal(loaded(data[0]), small(data[0]))
        # The ranks are low and the weights random: near, but not the same.
        assert 1e-4 < relative(small(data[0]), model(data[0])) < 0.5


def test_they_are_timed_too() -> None:
    analysis = rankfold.analyze(mixed(), images()[:1], metric="weight", timed=True)
    timings = {layer.name: layer.timing for layer in analysis.layers}
    for name in ("grouped", "up", "up_grouped"):
        assert timings[name].dense_ms > 0 and timings[name].tables["svd"].min() > 0


def test_a_grouped_convolution_is_as_many_plain_ones() -> None:
    layer = nn.Conv2d(12, 18, 3, groups=3, bias=False, dtype=torch.float64)
    moments = Moments(
        torch.stack([weight_of(36, seed) for seed in range(3)]),
        torch.stack([weight_of(6, 10 + seed) for seed in range(3)]),
        scale=2.0,
    )
    family = reduction.fit(LowRank(alignment=1), layer, moments)
    weight, losses = family.build((4,)).to_dense().weight.detach(), []
    for group in range(3):
        plain = nn.Conv2d(4, 6, 3, bias=False, dtype=torch.float64)
        with torch.no_grad():
            plain.weight.copy_(layer.weight[6 * group : 6 * group + 6])
        metric = Moments(moments.inputs[group], moments.gradients[group], scale=2.0)
        alone = LowRank(alignment=1).fit(plain, metric)
        losses.append(alone.loss((4,)))
        expected = alone.build((4,)).to_dense().weight
        torch.testing.assert_close(weight[6 * group : 6 * group + 6], expected)
    assert family.loss((4,)) == pytest.approx(sum(losses), rel=1e-9)


def test_without_a_scale_the_loss_is_relative_to_the_whole_weight() -> None:
    """Not to each group's: a group that is 0 but for one filter is as cheap as it is small."""
    layer = nn.Conv2d(8, 8, 3, groups=2, dtype=torch.float64)
    with torch.no_grad():
        layer.weight[4:] *= 1e-3
    family = reduction.fit(LowRank(alignment=1), layer, WEIGHT_METRIC)
    for rank in family.ranks():
        error = relative(family.build(rank).to_dense().weight, layer.weight) ** 2
        assert family.loss(rank) == pytest.approx(error, abs=1e-12)


@pytest.mark.parametrize("known", [("A", "G"), ("A",), ("G",), ()])
def test_svd_of_a_transposed_convolution_loses_the_tail_of_its_whitened_weight(known) -> None:
    """Eckart and Young, of the weight (in, out * kernel)."""
    layer = nn.ConvTranspose2d(10, 6, (3, 2), stride=2, dtype=torch.float64)
    inputs, gradients = weight_of(10, 1), weight_of(6, 2)
    moments = Moments(
        inputs if "A" in known else None, gradients if "G" in known else None, scale=1.0
    )
    whitened = layer.weight.detach().clone()
    if "A" in known:
        root = torch.linalg.cholesky(inputs)
        whitened = torch.einsum("ji,jokl->iokl", root, whitened)
    if "G" in known:
        root = torch.linalg.cholesky(gradients)
        whitened = torch.einsum("po,ipkl->iokl", root, whitened)
    squares = torch.linalg.svdvals(whitened.flatten(1)).square()
    family = reduction.fit(LowRank(alignment=1), layer, moments)
    assert family.ranks()[-1] == (10,)
    for rank in range(1, 11):
        assert family.loss((rank,)) == pytest.approx(squares[rank:].sum().item(), abs=1e-9)


def test_the_cost_of_a_transposed_convolution_by_hand() -> None:
    layer = nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1)
    for method, rank, parameters, macs in [
        # 1x1 of 16 to 3 on 5x5 inputs, then 3 to 8 with a kernel of 16 places from each of them.
        (LowRank(), (3,), 16 * 3 + 3 * 8 * 16, 25 * (16 * 3 + 3 * 8 * 16)),
        # Ranks (3, 5) of the adjoint: 16 to 3, 3 to 5 with the kernel, 5 to 8 on 10x10 outputs.
        (Tucker2(1), (3, 5), 48 + 15 * 16 + 40, 25 * (48 + 15 * 16) + 100 * 40),
    ]:
        form = reduction.skeleton(method, layer, rank)
        assert count_parameters(form) == parameters + 8
        assert count_layer_macs(form, [(1, 16, 5, 5)]) == macs
    assert [type(factor) for factor in form] == [nn.Conv2d, nn.ConvTranspose2d, nn.Conv2d]


def test_the_cost_of_a_grouped_convolution_by_hand() -> None:
    layer = nn.Conv2d(16, 32, 3, padding=1, groups=4)
    form = reduction.skeleton(LowRank(), layer, (2,))
    assert [factor.groups for factor in form] == [4, 4]
    assert [tuple(factor.weight.shape) for factor in form] == [(8, 4, 3, 3), (32, 2, 1, 1)]
    assert count_layer_macs(form, [(1, 16, 5, 5)]) == 25 * (8 * 4 * 9 + 32 * 2)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.Conv2d(32, 32, 3, groups=32), "grouped convolution, groups=32: depthwise"),
        (nn.Conv2d(32, 64, 3, groups=32), "depthwise, with a single channel in a group"),
        (nn.ConvTranspose2d(64, 32, 3, groups=32), "transposed convolution, groups=32: depthwise"),
        (nn.Conv2d(32, 32, 1, groups=2), "groups=2: a kernel of 1x1"),
        (nn.Conv2d(12, 32, 3, groups=4), "groups=4: only 3 input channels"),
        (nn.ConvTranspose2d(32, 8, 3), "transposed convolution: only 8 input channels"),
    ],
)
def test_why_a_layer_is_left(layer, words) -> None:
    assert words in reduction.why_not(Tucker2(), layer)


def test_other_layers_are_the_methods_own() -> None:
    layer = nn.Conv2d(32, 32, 3)
    assert reduction.why_not(Tucker2(), layer) is None
    assert "LSTM" in reduction.why_not(Tucker2(), nn.LSTM(8, 8))
    family = reduction.fit(Tucker2(), layer, WEIGHT_METRIC)
    assert type(family).__name__ == "Tucker2Family"
    assert repr(reduction.skeleton(Tucker2(), layer, (8, 8))) == repr(family.build((8, 8)))


def test_a_method_whose_form_is_no_chain_is_not_asked() -> None:
    class Branching(LowRank):
        makes_chains = False

    assert Branching().why_not(nn.Conv2d(8, 8, 3)) is None
    for layer in (nn.Conv2d(8, 8, 3, groups=2), nn.ConvTranspose2d(8, 8, 3)):
        assert "no chain" in reduction.why_not(Branching(), layer)


def test_ranks_are_aligned_over_all_groups_together() -> None:
    family = reduction.fit(LowRank(alignment=8), nn.Conv2d(32, 32, 3, groups=4), WEIGHT_METRIC)
    assert list(family.ranks()) == [(2,), (4,), (6,), (8,)]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(16, 24, 3, stride=(2, 1), padding=1, groups=2),
        nn.ConvTranspose2d(16, 24, (3, 5), (2, 1), 1, (1, 0), groups=2, dilation=(1, 2)),
    ],
    ids=str,
)
def test_the_form_exports_and_round_trips_like_any_module(layer) -> None:
    method, given = LowRank(), tensor_of((2, 16, 7, 6), torch.float32)
    form = reduction.fit(method, layer, WEIGHT_METRIC).build((4,)).eval()
    exported = torch.export.export(form, (given,)).module()
    torch.testing.assert_close(exported(given), form(given))
    other = reduction.skeleton(method, layer, (4,)).to_empty(device="cpu").eval()
    other.load_state_dict(form.state_dict())
    assert torch.equal(other(given), form(given))
