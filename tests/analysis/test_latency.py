import copy
import math
from importlib import import_module
from itertools import count, product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import make_data, make_model
from torch import nn

from rankfold.analysis import alone, latency
from rankfold.analysis.latency import (
    LayerTiming,
    LayerToTime,
    NetworkTiming,
    coarse_grid,
    device_name,
    time_network,
)
from rankfold.analysis.timing_cache import TimingCache
from rankfold.batches import run
from rankfold.methods import WEIGHT_METRIC, LowRank, Method, Tucker2

axes = st.lists(st.integers(1, 200), min_size=1, max_size=5, unique=True).map(
    lambda values: tuple(sorted(values))
)
grids = st.lists(axes, min_size=1, max_size=3).map(tuple)


def next_block(entry: int) -> int:
    return entry if entry <= 32 else -(-entry // 32) * 32


def timing_of(grid, table) -> LayerTiming:
    return LayerTiming(1.0, {"method": grid}, {"method": np.asarray(table, dtype=float)})


@given(grids, st.integers(0, 1000))
def test_at_the_points_of_the_grid_times_are_those_measured(grid, seed) -> None:
    grid = tuple(tuple(sorted(set(map(next_block, entry)))) for entry in grid)
    table = np.random.default_rng(seed).random([len(entry) for entry in grid])
    found = timing_of(grid, table).of("method", list(product(*grid)))
    np.testing.assert_allclose(found, table.flatten(), rtol=1e-12)


def test_ranks_that_fill_a_block_in_part_take_as_long_as_whole_blocks() -> None:
    timing = timing_of(((8, 32, 64, 120),), [1.0, 2.0, 6.0, 8.0])
    ranks = [(8,), (20,), (32,), (33,), (40,), (64,), (72,), (96,), (104,), (120,)]
    found = timing.of("method", ranks)
    at_96 = 6 + 2 * 32 / 56
    assert found.tolist() == pytest.approx([1, 1.5, 2, 6, 6, 6, at_96, at_96, 8, 8])


@given(grids, st.integers(0, 1000), st.data())
def test_between_and_beyond_times_are_multilinear_and_clipped(grid, seed, data) -> None:
    """A table that is a product of straight lines is met everywhere within the grid."""
    slopes = np.random.default_rng(seed).random(len(grid))

    def value(rank) -> float:
        return math.prod(1 + slope * entry for slope, entry in zip(slopes, rank, strict=True))

    table = [value(rank) for rank in product(*grid)]
    timing = timing_of(grid, np.reshape(table, [len(entry) for entry in grid]))
    ranks = data.draw(st.lists(st.tuples(*(st.integers(1, 300) for _ in grid)), min_size=1))
    clipped = [
        [min(max(next_block(e), axis[0]), axis[-1]) for e, axis in zip(rank, grid, strict=True)]
        for rank in ranks
    ]
    found = timing.of("method", ranks)
    np.testing.assert_allclose(found, [value(rank) for rank in clipped], rtol=1e-9)


def test_axes_of_one_rank_have_nothing_to_interpolate() -> None:
    assert timing_of(((8,),), [3.0]).of("method", [(8,), (1,)]).tolist() == [3, 3]
    assert timing_of(((8,), (4,)), [[3.0]]).of("method", [(8, 4)]).tolist() == [3]
    one_axis = timing_of(((8,), (4, 8)), [[1.0, 2.0]])
    assert one_axis.of("method", [(8, 4), (9, 6), (1, 99)]).tolist() == [1, 1.5, 2]
    other_axis = timing_of(((4, 8), (8,)), [[1.0], [2.0]])
    assert other_axis.of("method", [(4, 8), (6, 9), (99, 1)]).tolist() == [1, 1.5, 2]


@given(
    st.integers(1, 3).flatmap(
        lambda entries: st.lists(
            st.tuples(*(st.integers(1, 500) for _ in range(entries))), min_size=1, max_size=40
        )
    )
)
def test_the_grid_has_a_few_ranks_the_least_and_greatest_among_them(ranks) -> None:
    grid = coarse_grid(ranks)
    for values, entry in zip(grid, zip(*ranks, strict=True), strict=True):
        assert list(values) == sorted(set(values))
        assert set(values) <= set(entry) and len(values) <= 6
        assert (values[0], values[-1]) == (min(entry), max(entry))
        if any(value <= 32 or value % 32 == 0 for value in entry):
            assert all(value <= 32 or value % 32 == 0 for value in values[1:-1])
    assert math.prod(len(values) for values in grid) <= {1: 6, 2: 16, 3: 27}[len(grid)]


@pytest.fixture
def quick(monkeypatch) -> None:
    """Whole networks are run as few times as there may be."""
    monkeypatch.setattr(import_module("rankfold.measure"), "_SECONDS", 1e-3)
    monkeypatch.setattr(alone, "_RUNS", (3, 3))  # the least that have a quartile


def to_time(model: nn.Module) -> list[LayerToTime]:
    shapes = {"body": (8, 32, 8, 8), "head": (8, 768)}
    found = []
    for name, shape in shapes.items():
        layer = model.get_submodule(name)
        able = (method for method in (Tucker2(), LowRank()) if method.why_not(layer) is None)
        methods: dict[str, Method] = {method.name: method for method in able}
        ranks = {
            key: list(method.fit(layer, WEIGHT_METRIC).ranks()) for key, method in methods.items()
        }
        found.append(LayerToTime(name, layer, (shape,), methods, ranks))
    return found


def refuse(*_: object) -> float:
    raise AssertionError("measured again")


def nothing(*_: object) -> dict[nn.Module, float]:
    """Of a network that runs none of its layers as modules: they are timed by themselves."""
    return {}


@pytest.mark.usefixtures("quick")
def test_a_network_is_timed_with_all_that_could_replace_its_layers(monkeypatch) -> None:
    monkeypatch.setattr(latency, "_MUCH_FASTER", 0.0)  # whatever the clock says of the formats
    model, batch, cache = make_model(), make_data()[0], TimingCache(None)
    layers = to_time(model)
    network, timings = time_network(model, batch, layers, run, cache)
    assert 0 < network.dense_ms < math.inf and 0 <= network.rest_ms < math.inf
    assert network.memory_format == "channels_last"
    assert network.threads == torch.get_num_threads()
    assert network.device == device_name(torch.device("cpu"))
    assert set(timings) == {"body", "head"}
    assert set(timings["body"].tables) == {"tucker2", "svd"}
    assert set(timings["head"].tables) == {"svd"}
    for layer in layers:
        timing = timings[layer.name]
        assert set(timing.tables) == set(layer.methods)
        assert 0 < timing.dense_ms < math.inf
        for key, table in timing.tables.items():
            assert timing.grids[key] == coarse_grid(layer.ranks[key])
            assert table.shape == tuple(len(entry) for entry in timing.grids[key])
            assert np.isfinite(table).all() and (table > 0).all()
            found = timing.of(key, layer.ranks[key])
            least, most = table.min() * (1 - 1e-9), table.max() * (1 + 1e-9)
            assert ((least <= found) & (found <= most)).all()
    # What is known is not measured again: only what the network spends in its layers is.
    monkeypatch.setattr(latency, "relative_in_place", refuse)
    monkeypatch.setattr(latency, "milliseconds", refuse)
    _, again = time_network(model, batch, layers, run, cache)
    for name, timing in again.items():
        for key, table in timing.tables.items():
            before = timings[name].tables[key] / timings[name].dense_ms
            np.testing.assert_allclose(table / timing.dense_ms, before, rtol=1e-9)
    with pytest.raises(AssertionError, match="measured again"):
        time_network(model, batch, layers, run, TimingCache(None))


@pytest.mark.usefixtures("quick")
def test_times_are_remembered_by_device_threads_shape_and_precision(monkeypatch) -> None:
    cache, layer = TimingCache(None), nn.Linear(8, 8)
    measured = []

    def note(module: nn.Module, given: torch.Tensor) -> float:
        measured.append((tuple(given.shape), given.dtype))
        return float(len(measured))

    monkeypatch.setattr(latency, "milliseconds", note)
    monkeypatch.setattr(latency, "shares_inside", nothing)
    monkeypatch.setattr(latency, "latencies", lambda calls, *_: [1000.0] * len(calls))

    def dense_ms(module: nn.Module, *shapes: tuple[int, ...]) -> float:
        dtype = next(module.parameters()).dtype
        layers = [LayerToTime("0", module, shapes, {}, {})]
        batch = torch.zeros(4, 8, dtype=dtype)
        return time_network(nn.Sequential(module), batch, layers, run, cache)[1]["0"].dense_ms

    assert dense_ms(layer, (4, 8)) == dense_ms(layer, (4, 8)) == 1
    assert dense_ms(layer, (5, 8)) == 2
    assert dense_ms(copy.deepcopy(layer).double(), (4, 8)) == 3
    assert dense_ms(nn.Linear(8, 8, bias=False), (4, 8)) == 4
    torch.set_num_threads(2)
    assert dense_ms(layer, (4, 8)) == 5
    torch.set_num_threads(1)
    assert dense_ms(nn.Linear(8, 8), (4, 8)) == 1  # the weights do not matter
    assert measured[2] == ((4, 8), torch.float64)
    # A layer that is called three times takes the time of three calls.
    assert dense_ms(layer, (4, 8), (5, 8), (4, 8)) == 2 * 1 + 2


@pytest.mark.usefixtures("quick")
def test_times_may_fall_with_rank(monkeypatch) -> None:
    """What was measured stands: torch runs small convolutions on a slower path than large ones."""
    counter = count()

    def ever_less(forms: dict[nn.Module, nn.Module], *_: object) -> dict[nn.Module, float]:
        return {layer: 100 - next(counter) for layer in forms}

    monkeypatch.setattr(latency, "relative_in_place", ever_less)
    model = make_model()
    _, timings = time_network(model, make_data()[0], to_time(model), run, TimingCache(None))
    for table in (timings["body"].tables["tucker2"], timings["head"].tables["svd"]):
        assert all((np.diff(table, axis=axis) < 0).all() for axis in range(table.ndim))


@pytest.mark.usefixtures("quick")
def test_what_is_left_is_the_network_without_the_layers(monkeypatch) -> None:
    monkeypatch.setattr(latency, "latencies", lambda calls, device, progress: [9.0, 7.0])
    model = make_model()
    for share, rest in ((0.2, 4.2), (0.5, 0)):
        monkeypatch.setattr(
            latency, "shares_inside", lambda layers, *_, each=share: dict.fromkeys(layers, each)
        )
        network, timings = time_network(
            model, make_data()[0], to_time(model), run, TimingCache(None)
        )
        assert (network.dense_ms, network.rest_ms) == (7, pytest.approx(rest))
        assert [timing.dense_ms for timing in timings.values()] == pytest.approx([7 * share] * 2)


@pytest.mark.usefixtures("quick")
def test_layers_by_themselves_take_no_longer_than_the_network_that_they_are_in(monkeypatch) -> None:
    """Handed its input alone, a layer may: together they made every network seem without gain."""
    monkeypatch.setattr(latency, "latencies", lambda calls, *_: [6.0] * len(calls))
    monkeypatch.setattr(latency, "shares_inside", nothing)
    model = make_model()

    def timed(each: float) -> tuple[NetworkTiming, list[LayerTiming]]:
        def milliseconds(module: nn.Module, given: torch.Tensor) -> float:
            return each if isinstance(module, nn.Conv2d | nn.Linear) else each / 2

        monkeypatch.setattr(latency, "milliseconds", milliseconds)
        network, timings = time_network(
            model, make_data()[0], to_time(model), run, TimingCache(None)
        )
        return network, list(timings.values())

    network, short = timed(2.0)
    assert [one.dense_ms for one in short] == [2, 2] and network.rest_ms == 2
    network, long = timed(12.0)
    assert [one.dense_ms for one in long] == [3, 3] and network.rest_ms == 0
    for one in long:
        assert one.tables["svd"] == pytest.approx(1.5)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("whole", "expected"),
    [([9.0, 7.0], "channels_last"), ([6.5, 7.0], "channels_last"), ([5.0, 7.0], "contiguous")],
)
def test_a_network_that_is_much_faster_contiguous_stays_so(monkeypatch, whole, expected) -> None:
    monkeypatch.setattr(latency, "latencies", lambda calls, device, progress: whole)
    model = make_model()
    network, _ = time_network(model, make_data()[0], to_time(model), run, TimingCache(None))
    assert network.memory_format == expected and network.dense_ms == min(whole)


@pytest.mark.usefixtures("quick")
def test_forms_take_multiples_of_what_their_layers_take_in_the_network(monkeypatch) -> None:
    monkeypatch.setattr(latency, "latencies", lambda calls, device, progress: [12.0, 12.0])
    monkeypatch.setattr(latency, "shares_inside", lambda layers, *_: dict.fromkeys(layers, 0.25))
    monkeypatch.setattr(
        latency, "relative_in_place", lambda forms, *_: dict.fromkeys(forms, 1 / len(forms))
    )
    model = make_model()
    layers = to_time(model)
    _, timings = time_network(model, make_data()[0], layers, run, TimingCache(None))
    assert {timing.dense_ms for timing in timings.values()} == {3}
    head = timings["head"].tables["svd"]  # with one of the body's forms in each run
    assert (head == 1.5).all()
    body = np.concatenate([table.flatten() for table in timings["body"].tables.values()])
    assert sorted(body) == [1.5] * len(head) + [3] * (len(body) - len(head))


@pytest.mark.usefixtures("quick")
def test_layers_that_are_alike_are_timed_once_and_take_the_same(monkeypatch) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 32))
    method = LowRank()
    layers = [
        LayerToTime(
            str(place),
            layer,
            ((8, 64),),
            {"svd": method},
            {"svd": list(method.fit(layer, WEIGHT_METRIC).ranks())},
        )
        for place, layer in enumerate(model)
    ]
    shares = dict(zip(model, (0.1, 0.3, 0.5), strict=True))
    monkeypatch.setattr(latency, "latencies", lambda calls, device, progress: [10.0])
    monkeypatch.setattr(latency, "shares_inside", lambda *_: shares)
    timed = []

    def note(forms: dict[nn.Module, nn.Module], *_: object) -> dict[nn.Module, float]:
        timed.append(set(forms))
        return dict.fromkeys(forms, 0.5)

    monkeypatch.setattr(latency, "relative_in_place", note)
    _, timings = time_network(model, torch.zeros(8, 64), layers, run, TimingCache(None))
    assert [timing.dense_ms for timing in timings.values()] == pytest.approx([2, 2, 5])
    assert timed[0] == {model[0], model[2]}
    assert not any(model[1] in forms for forms in timed)
    np.testing.assert_allclose(timings["1"].tables["svd"], 1.0)


@pytest.mark.usefixtures("quick")
def test_forms_of_a_layer_that_a_network_leaves_out_at_times_gain_nothing(monkeypatch) -> None:
    monkeypatch.setattr(latency, "relative_in_place", nothing)
    model = make_model()
    _, timings = time_network(model, make_data()[0], to_time(model), run, TimingCache(None))
    for timing in timings.values():
        assert all((table == timing.dense_ms).all() for table in timing.tables.values())


@pytest.mark.usefixtures("quick")
def test_layers_that_the_network_does_not_run_are_timed_by_themselves() -> None:
    class ReadsWeights(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(given, self.layer.weight, self.layer.bias)

    model, method = ReadsWeights(), LowRank()
    ranks = {"svd": list(method.fit(model.layer, WEIGHT_METRIC).ranks())}
    layers = [LayerToTime("layer", model.layer, ((8, 32),), {"svd": method}, ranks)]
    _, timings = time_network(model, torch.zeros(8, 32), layers, run, TimingCache(None))
    assert timings["layer"].dense_ms > 0 and (timings["layer"].tables["svd"] > 0).all()


@pytest.mark.usefixtures("quick")
def test_layers_are_timed_in_the_format_of_the_network(monkeypatch) -> None:
    seen = []

    def look(layer: nn.Module, given: torch.Tensor) -> float:
        weights = [parameter for parameter in layer.parameters() if parameter.dim() == 4]
        assert not any(module.training for module in layer.modules())
        assert not torch.is_grad_enabled()
        last = torch.channels_last
        seen.append(
            given.is_contiguous(memory_format=last)
            and all(weight.is_contiguous(memory_format=last) for weight in weights)
            if given.dim() == 4
            else given.is_contiguous()
        )
        return 1.0

    monkeypatch.setattr(latency, "milliseconds", look)
    monkeypatch.setattr(latency, "shares_inside", nothing)
    model = make_model()
    time_network(model, make_data()[0], to_time(model), run, TimingCache(None))
    assert len(seen) > 20 and all(seen)


@pytest.mark.usefixtures("quick")
def test_forms_in_place_are_in_the_format_of_the_network(monkeypatch) -> None:
    seen = []

    def look(forms: dict[nn.Module, nn.Module], *_: object) -> dict[nn.Module, float]:
        for form in forms.values():
            assert not any(module.training for module in form.modules())
            weights = [weight for weight in form.parameters() if weight.dim() == 4]
            last = torch.channels_last
            seen.extend(weight.is_contiguous(memory_format=last) for weight in weights)
        return dict.fromkeys(forms, 1.0)

    monkeypatch.setattr(latency, "_MUCH_FASTER", 0.0)  # whatever the clock says of the formats
    monkeypatch.setattr(latency, "relative_in_place", look)
    model = make_model()
    time_network(model, make_data()[0], to_time(model), run, TimingCache(None))
    assert len(seen) > 20 and all(seen)


@pytest.mark.usefixtures("quick")
def test_linear_layers_of_maps_are_timed_on_rows_that_lie_together(monkeypatch) -> None:
    """(n, height, width, channels), as ConvNeXt and Swin have them."""
    seen = []

    def look(layer: nn.Module, given: torch.Tensor) -> float:
        seen.append(given.is_contiguous())
        return 1.0

    monkeypatch.setattr(latency, "milliseconds", look)
    monkeypatch.setattr(latency, "shares_inside", nothing)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(5, 6))
    layers = [LayerToTime("1", model[1], ((2, 4, 7, 5),), {}, {})]
    time_network(model, torch.zeros(2, 3, 7, 5), layers, run, TimingCache(None))
    assert seen == [True]


@pytest.mark.usefixtures("quick")
def test_networks_without_convolutions_are_timed_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    layers = [LayerToTime("0", model[0], ((4, 8),), {}, {})]
    network, timings = time_network(model, torch.zeros(4, 8), layers, run, TimingCache(None))
    assert network.memory_format == "contiguous"
    assert timings["0"].dense_ms > 0 and not timings["0"].tables


@pytest.mark.usefixtures("quick")
def test_the_weights_and_layers_of_the_network_are_left_as_they_were() -> None:
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    strides = [parameter.stride() for parameter in model.parameters()]
    time_network(model, make_data()[0], to_time(model), run, TimingCache(None))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert strides == [parameter.stride() for parameter in model.parameters()]


@pytest.mark.usefixtures("quick")
def test_the_network_stays_in_its_mode() -> None:
    model = make_model().train()
    model.norm.eval()
    time_network(model, make_data()[0], [], run, TimingCache(None))
    assert model.training and model.body.training and not model.norm.training


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_of_every_precision_are_timed(dtype) -> None:
    model = make_model().to(dtype)
    layers = to_time(model)[1:]
    network, timings = time_network(model, make_data()[0].to(dtype), layers, run, TimingCache(None))
    assert network.dense_ms > 0 and (timings["head"].tables["svd"] > 0).all()
