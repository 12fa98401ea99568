from itertools import combinations

import pytest
import torch
from geometry import relative
from tensors import tensor_of, weight_of
from torch import nn

import rankfold
from rankfold.decompose import interpolative
from rankfold.layers import SelectedChannels
from rankfold.methods import WEIGHT_METRIC, Interpolative, Moments


def by_brute_force(layer: nn.Module, moments: Moments, channels) -> tuple[float, torch.Tensor]:
    """The least squared error with these channels alone, by least squares on whitened patches."""
    weight = layer.weight.detach().flatten(1)
    places = weight.shape[1] // layer.weight.shape[1]
    inputs = moments.inputs
    if inputs is None:
        inputs = torch.eye(weight.shape[1], dtype=torch.float64)
    if len(inputs) != weight.shape[1]:
        inputs = torch.kron(inputs, torch.eye(places, dtype=torch.float64))
    root = torch.linalg.cholesky(inputs).mT  # patches are rows of the root
    columns = [channel * places + place for channel in channels for place in range(places)]
    fitted = torch.linalg.lstsq(root[:, columns], root @ weight.mT).solution.mT
    whole = torch.zeros_like(weight)
    whole[:, columns] = fitted
    difference = (whole - weight).reshape(layer.weight.shape)
    return moments.squared_error(difference), whole.reshape(layer.weight.shape)


CASES = [
    (nn.Linear(9, 7), "patches"),
    (nn.Conv1d(6, 5, 3), "patches"),
    (nn.Conv2d(6, 5, (3, 2)), "patches"),
    (nn.Conv2d(6, 5, (3, 2)), "channels"),
    (nn.Conv2d(6, 5, (3, 2)), ""),
]


def a_case(layer: nn.Module, known: str) -> tuple[nn.Module, Moments]:
    layer = layer.double()
    sizes = {"patches": layer.weight[0].numel(), "channels": layer.weight.shape[1]}
    return layer, Moments(
        weight_of(sizes[known], seed=2) if known else None,
        weight_of(layer.weight.shape[0], seed=3),
    )


@pytest.mark.parametrize(("layer", "known"), CASES, ids=str)
def test_the_kept_channels_are_regressed_on_and_the_loss_is_the_error(layer, known) -> None:
    layer, moments = a_case(layer, known)
    whole = moments.squared_error(layer.weight.detach())
    family = Interpolative(alignment=1).fit(layer, moments)
    for (rank,) in family.ranks():
        form = family.build((rank,))
        error, weight = by_brute_force(layer, moments, form[0].channels.tolist())
        assert relative(form.to_dense().weight.detach(), weight) < 1e-4
        assert family.loss((rank,)) == pytest.approx(error / whole, abs=1e-6)


@pytest.mark.parametrize(("layer", "known"), CASES, ids=str)
def test_each_channel_taken_is_the_best_to_take_next(layer, known) -> None:
    """And so the first one and the last one to be left out are the best of all."""
    layer, moments = a_case(layer, known)
    order = Interpolative(alignment=1).fit(layer, moments).order.tolist()
    for count in range(1, len(order) + 1):
        taken = order[: count - 1]
        errors = {
            channel: by_brute_force(layer, moments, [*taken, channel])[0]
            for channel in order
            if channel not in taken
        }
        assert errors[order[count - 1]] == pytest.approx(min(errors.values()), abs=1e-6)


def test_greedy_is_near_the_best_of_all_subsets() -> None:
    layer, moments = a_case(nn.Conv1d(8, 5, 2), "patches")
    family = Interpolative(alignment=1).fit(layer, moments)
    whole = moments.squared_error(layer.weight.detach())
    for rank in (2, 4, 6):
        best = min(by_brute_force(layer, moments, s)[0] for s in combinations(range(8), rank))
        assert best <= family.loss((rank,)) * whole * (1 + 1e-9) <= 1.5 * best


def test_it_chooses_as_the_decomposition_of_the_responses_does() -> None:
    """A peer: greedy columns of A^½, with W as the weight of what they explain."""
    layer, inputs = nn.Linear(10, 6, dtype=torch.float64), weight_of(10, seed=2)
    family = Interpolative(alignment=1).fit(layer, Moments(inputs))
    weight = layer.weight.detach()
    root = torch.linalg.cholesky(inputs).mT
    seen = interpolative(root, rank=6, weights={1: weight.mT @ weight + 1e-9 * torch.eye(10)})
    assert seen.columns.tolist() == family.order[:6].tolist()


def test_dead_and_repeated_channels_go_without_loss() -> None:
    layer = nn.Conv2d(6, 8, 3, padding=1, dtype=torch.float64)
    given = tensor_of((4, 6, 7, 7))
    given[:, 1] = 0
    given[:, 4] = 2 * given[:, 2] - given[:, 0]
    statistics = rankfold.analysis.statistics.gather(
        layer, {"": layer}, [given], rankfold.batches.run, []
    )[""]
    family = Interpolative(alignment=1).fit(layer, Moments(statistics.inputs))
    assert family.loss((3,)) > 1e-3 > 1e-6 > family.loss((4,))
    form = family.build((4,))
    assert 1 not in form[0].channels
    assert relative(form(given), layer(given)) < 1e-3


def test_of_fewer_samples_than_features_weights_do_not_grow() -> None:
    """Past as many channels as samples, what is left of the others is rounding of float32."""
    layer = nn.Linear(120, 16)
    given = tensor_of((40, 120)).float() + 3
    moment = (given.mT @ given / 40).double()
    moment += 1e-6 * moment.diagonal().mean() * torch.eye(120)
    family = Interpolative().fit(layer, Moments(moment))
    for rank in (56, 80, 112):
        weight = family.build((rank,))[1].weight
        assert weight.norm() < 5 * layer.weight.norm()
        assert family.loss((rank,)) < 1e-5


@pytest.mark.parametrize("ridge", [1e-10, 1e-18])
@pytest.mark.parametrize("places", [1, 9])
def test_moments_beyond_the_digits_of_float64_do_no_harm(places, ridge, monkeypatch) -> None:
    """What is left of a channel is rounding, and larger than the ridge that should cover it.

    Of few directions and of sizes far apart; thousands of channels do the same to any ridge.
    """
    monkeypatch.setattr("rankfold.methods.interpolative._RIDGE", ridge)
    layer = nn.Conv2d(24, 8, 3, dtype=torch.float64)
    sizes = torch.logspace(0, 6, 24 * places, dtype=torch.float64)
    seen = tensor_of((24 * places, 5)) * sizes[:, None]
    moments = Moments(seen @ seen.mT)
    family = Interpolative(alignment=1).fit(layer, moments)
    losses = [family.loss(rank) for rank in family.ranks()]
    assert losses == sorted(losses, reverse=True) and losses[-1] == 0
    whole = moments.squared_error(layer.weight.detach())
    for rank in family.ranks():
        form = family.build(rank)
        assert all(torch.isfinite(parameter).all() for parameter in form.parameters())
        error = moments.squared_error((form.to_dense().weight - layer.weight).detach())
        assert abs(error) / whole <= family.loss(rank) + 1e-6


@pytest.mark.parametrize("has_batch", [True, False])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(20, 6), (3, 20)),
        (nn.Conv1d(20, 6, 3, stride=2), (20, 9)),
        (nn.Conv2d(20, 6, (3, 1), padding=(2, 1), dilation=(2, 1)), (20, 9, 8)),
    ],
    ids=str,
)
def test_the_form_reads_the_channels_whatever_leads(layer, shape, has_batch) -> None:
    channels = torch.tensor([1, 4, 5, 19])
    form = SelectedChannels(layer, channels)
    given = torch.randn(2, *shape) if has_batch else torch.randn(shape)
    dense = form.to_dense()
    assert repr(dense) == repr(layer)
    torch.testing.assert_close(form(given), dense(given))
    exported = torch.export.export(form, (given,)).module()
    torch.testing.assert_close(exported(given), form(given))
    other = SelectedChannels(layer, torch.zeros(4, dtype=torch.int64))
    other.load_state_dict(form.state_dict())
    assert torch.equal(other(given), form(given))


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.Conv2d(3, 64, 3), "only 3 input channels to choose from"),
        (nn.Conv2d(32, 32, 3, groups=2), "groups=2"),
        (nn.LSTM(8, 8), "LSTM"),
    ],
)
def test_why_a_layer_is_left(layer, words) -> None:
    assert words in Interpolative().why_not(layer)


def test_a_network_is_saved_loaded_and_timed(tmp_path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 16, 3), nn.Flatten(), nn.Linear(256, 5)
        ).eval()

    data = list(tensor_of((12, 3, 8, 8), torch.float32).split(3))
    analysis = rankfold.analyze(make(), data, methods=[Interpolative()], timed=True)
    plan = analysis.plan(macs=0.6)
    assert {entry.method for entry in plan.factorized} == {"interpolative"}
    small = rankfold.factorize(make(), plan, analysis=analysis)
    rankfold.save(small, tmp_path / "small")
    loaded = rankfold.load(tmp_path / "small", like=make)
    with torch.no_grad():
        assert torch.equal(loaded(data[0]), small(data[0]))


def test_without_moments_the_largest_channels_stay() -> None:
    layer = nn.Linear(12, 5)
    with torch.no_grad():
        layer.weight[:, [2, 7]] *= 10
    form = Interpolative(alignment=1).fit(layer, WEIGHT_METRIC).build((2,))
    assert form[0].channels.tolist() == [2, 7]
    assert torch.equal(form[1].weight, layer.weight[:, [2, 7]])
