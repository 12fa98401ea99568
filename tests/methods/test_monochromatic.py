import pytest
import torch
from geometry import relative
from tensors import tensor_of, weight_of
from torch import nn

import rankfold
from rankfold.cost import count_layer_macs, count_parameters
from rankfold.layers import ChannelSelection, MonochromaticConvolution
from rankfold.methods import WEIGHT_METRIC, Moments, Monochromatic


def a_layer(outputs: int = 24, seed: int = 0) -> nn.Conv2d:
    layer = nn.Conv2d(3, outputs, 3, padding=1, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(tensor_of(layer.weight.shape, seed=seed))
    return layer


def lost(form: nn.Module, layer: nn.Module, moments: Moments) -> float:
    weight = layer.weight.detach()
    difference = form.to_dense().weight.detach() - weight
    return moments.squared_error(difference) / moments.squared_error(weight)


METRICS = {
    "weight": Moments(),
    "patches": Moments(weight_of(27, 1)),
    "channels": Moments(weight_of(3, 1)),
    "both": Moments(weight_of(27, 1), weight_of(24, 2)),
}


@pytest.mark.parametrize("colours", [1, 4, 7])
@pytest.mark.parametrize("metric", METRICS)
def test_a_layer_of_few_colours_in_any_order_is_recovered(metric, colours) -> None:
    layer = a_layer()
    palette, filters = tensor_of((colours, 3), seed=1), tensor_of((24, 3, 3), seed=2)
    chosen = torch.arange(24).remainder(colours)[torch.randperm(24)]
    with torch.no_grad():
        layer.weight.copy_(torch.einsum("oi,ohw->oihw", palette[chosen], filters))
    form = Monochromatic().fit(layer, METRICS[metric]).build((colours,))
    assert relative(form.to_dense().weight, layer.weight) < 1e-5


def test_with_a_colour_each_filters_are_their_best_rank_one() -> None:
    layer = a_layer()
    values = torch.linalg.svdvals(layer.weight.detach().flatten(2))
    expected = (1 - values[:, 0].square().sum() / values.square().sum()).item()
    family = Monochromatic().fit(layer, WEIGHT_METRIC)
    assert family.loss((24,)) == pytest.approx(expected, rel=1e-9)
    form = family.build((24,))
    assert lost(form, layer, WEIGHT_METRIC) == pytest.approx(expected, rel=1e-9)
    assert len(form) == 2 and not any(isinstance(one, ChannelSelection) for one in form)


@pytest.mark.parametrize("metric", METRICS)
def test_it_is_no_worse_than_clustered_singular_vectors(metric) -> None:
    """The paper's: k-means of the filters' colours, here from the best of some random starts."""
    layer, moments = a_layer(), METRICS[metric]
    weight = layer.weight.detach().flatten(2)
    own = torch.linalg.svd(weight).U[..., 0]
    own = own * own[:, :1].sign()
    errors = []
    for seed in range(10):
        start = torch.randperm(24, generator=torch.Generator().manual_seed(seed))[:4]
        centres = own[start]
        for _ in range(30):
            chosen = torch.cdist(own, centres).argmin(1)
            means = [own[chosen == k].mean(0) for k in range(4) if (chosen == k).any()]
            centres = torch.stack(means)
        chosen = torch.cdist(own, centres).argmin(1)
        colours = nn.functional.normalize(centres, dim=1)[chosen]
        product = colours[:, :, None] * torch.einsum("oip,oi->op", weight, colours)[:, None]
        errors.append(moments.squared_error(product - weight) / moments.squared_error(weight))
    assert lost(Monochromatic().fit(layer, moments).build((4,)), layer, moments) < min(errors)


@pytest.mark.parametrize("metric", ["weight", "patches", "channels"])
def test_no_other_choice_of_a_colour_is_better_nor_is_a_step_of_a_factor(metric) -> None:
    """Filters and colours are at their best: a step to either side costs the same."""
    layer, moments = a_layer(), METRICS[metric]
    form = Monochromatic().fit(layer, moments).build((4,))
    least = lost(form, layer, moments)
    for place in (0, 2):
        weight = form[place].weight
        for seed in range(5):
            step = 1e-2 * tensor_of(weight.shape, seed=seed) * weight.detach().norm()
            with torch.no_grad():
                weight.add_(step)
                ahead = lost(form, layer, moments)
                weight.sub_(2 * step)
                behind = lost(form, layer, moments)
                weight.add_(step)
            assert min(ahead, behind) > least
            assert ahead - least == pytest.approx(behind - least, rel=0.1)


def test_costs_by_hand() -> None:
    layer = nn.Conv2d(3, 32, 5, stride=2, padding=2, bias=False)
    form = Monochromatic().skeleton(layer, (8,))
    assert count_parameters(form) == 3 * 8 + 32 * 25
    assert count_layer_macs(form, [(1, 3, 10, 10)]) == 3 * 8 * 100 + 32 * 25 * 25


def test_exports_and_round_trips_like_any_module() -> None:
    layer = nn.Conv2d(3, 24, 3, padding=1, stride=(2, 1), dilation=(1, 2))
    form = Monochromatic().fit(layer, WEIGHT_METRIC).build((8,)).eval()
    given = torch.randn(2, 3, 7, 7)
    torch.testing.assert_close(torch.export.export(form, (given,)).module()(given), form(given))
    other = MonochromaticConvolution(layer, 8, torch.zeros(24, dtype=torch.int64)).eval()
    other.load_state_dict(form.state_dict())
    assert torch.equal(other(given), form(given))


def test_a_network_is_saved_and_loaded(tmp_path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 32, 5), nn.ReLU(), nn.Flatten(), nn.Linear(512, 5)).eval()

    data = list(tensor_of((12, 3, 8, 8), torch.float32).split(3))
    analysis = rankfold.analyze(make(), data, methods=["monochromatic"])
    plan = analysis.plan(macs=0.6)
    assert [entry.method for entry in plan.factorized] == ["monochromatic"]
    small = rankfold.factorize(make(), plan, analysis=analysis)
    rankfold.save(small, tmp_path / "small")
    loaded = rankfold.load(tmp_path / "small", like=make)
    with torch.no_grad():
        assert torch.equal(loaded(data[0]), small(data[0]))


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.Conv2d(1, 64, 3), "a single input channel is one colour"),
        (nn.Conv2d(64, 64, 3), "64 input channels: a method for first layers"),
        (nn.Conv2d(3, 64, 1), "no spatial modes"),
        (nn.Conv2d(6, 64, 3, groups=2), "groups=2"),
        (nn.Linear(3, 8), "Linear"),
    ],
)
def test_why_a_layer_is_left(layer, words) -> None:
    assert words in Monochromatic().why_not(layer)


@pytest.mark.parametrize("most", [1, 0, 2.0, True])
def test_senseless_settings_are_refused(most) -> None:
    with pytest.raises(ValueError, match="most_inputs"):
        Monochromatic(most_inputs=most)
