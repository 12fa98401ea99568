import copy
import json
from dataclasses import replace

import geometry
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recurrent import assert_same
from tensors import seeds, tensor_of
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rankfold
from rankfold import search
from rankfold.analysis import Overrides
from rankfold.analysis.latency import NetworkTiming
from rankfold.batches import run
from rankfold.cost import count_macs, count_parameters
from rankfold.errors import CheckpointError, PlanError
from rankfold.layers import FewerUnits, TwoFactorLinear
from rankfold.merging import merge_pairs, merge_readouts, merged, multiply
from rankfold.methods import METHODS, WEIGHT_METRIC
from rankfold.plan import Plan
from rankfold.progress import silent


class Reader(nn.Module):
    """A bidirectional LSTM that one linear layer reads, and a GRU of which the state is read."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(12, 32, num_layers=2, batch_first=True, bidirectional=True)
        self.between = nn.Linear(64, 40)
        self.second = nn.GRU(40, 32, batch_first=True)
        self.out = nn.Linear(32, 7)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        between = torch.relu(self.between(self.first(given)[0]))
        return self.out(self.second(between)[1][-1])


def make_reader() -> Reader:
    """Two directions of the inputs are enough to make its states depend on each other."""
    model = Reader().eval()
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(0.25 * tensor_of(parameter.shape, torch.float32, seed=index))
    return model


def make_sequences() -> list[torch.Tensor]:
    mixing = tensor_of((2, 12), torch.float32, seed=50)
    return [tensor_of((6, 9, 2), torch.float32, seed=60 + index) @ mixing for index in range(10)]


@pytest.fixture(scope="module")
def analysis() -> rankfold.Analysis:
    return rankfold.analyze(make_reader(), make_sequences())


GROUPS = st.integers(1, 3)
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
KINDS = st.one_of(
    geometry.linears(dtype=torch.float64),
    geometry.convolutions(st.integers(1, 6), torch.float64, GROUPS),
    geometry.transposed_convolutions(st.integers(1, 6), torch.float64, GROUPS),
)


def norm_of(layer: nn.Module, channels: int, seed: int, affine: bool = True) -> nn.Module:
    """A batch norm for what the layer takes or gives, of statistics far from 0 and 1."""
    kind = nn.BatchNorm1d if isinstance(layer, nn.Linear) else NORMS[layer.weight.dim() - 2]
    norm = kind(channels, eps=0.01, affine=affine, dtype=torch.float64).eval()
    tensors = [norm.running_mean, *norm.parameters()]
    for index, tensor in enumerate(tensors):
        tensor.data.copy_(tensor_of(tensor.shape, seed=seed + index))
    norm.running_var.copy_(tensor_of(norm.running_var.shape, seed=seed + 9).square() + 0.1)
    return norm


def widths_of(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


@given(KINDS, st.booleans(), seeds)
def test_a_batch_norm_folded_into_the_layer_before_it(case, affine, seed) -> None:
    layer, shape = case
    inputs, outputs = widths_of(layer)
    shape = (3, inputs) if isinstance(layer, nn.Linear) else shape
    norm = norm_of(layer, outputs, seed, affine)
    both = merged(layer, norm)
    assert type(both) is type(layer) and both.weight.shape == layer.weight.shape
    batch = tensor_of(shape, seed=seed)
    assert_same(both(batch), norm(layer(batch)))
    assert merged(layer, norm_of(layer, outputs + 1, seed)) is None


@given(KINDS, st.booleans(), seeds)
def test_a_batch_norm_folded_into_the_layer_after_it(case, affine, seed) -> None:
    layer, shape = case
    inputs, _ = widths_of(layer)
    shape = (3, inputs) if isinstance(layer, nn.Linear) else shape
    norm = norm_of(layer, inputs, seed, affine)
    both = merged(norm, layer)
    if both is not None:
        batch = tensor_of(shape, seed=seed)
        assert_same(both(batch), layer(norm(batch)))
        assert merged(norm_of(layer, inputs + 1, seed), layer) is None
        return
    zeros = getattr(layer, "padding_mode", "") == "zeros" and layer.padding != "valid"
    assert getattr(layer, "transposed", False) or (zeros and layer.padding != (0, 0, 0))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@given(
    geometry.convolutions(st.integers(1, 8), torch.float64), st.integers(1, 8), st.booleans(), seeds
)
def test_a_convolution_and_a_1x1_as_one(case, outputs, bias, seed) -> None:
    first, shape = case
    kind = type(first)
    second = kind(first.out_channels, outputs, 1, bias=bias, dtype=torch.float64)
    before = count_parameters(nn.Sequential(first, second))
    product = multiply(first, second)
    batch = tensor_of(shape, seed=seed)
    assert_same(product(batch), second(first(batch)))
    assert product.out_channels == outputs and product.in_channels == first.in_channels
    cheaper = count_parameters(product) <= before and count_macs(
        lambda: product(batch)
    ) <= count_macs(lambda: second(first(batch)))
    assert (merged(first, second) is not None) == cheaper


def conv(inputs: int, outputs: int, kernel: int = 1, **settings: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, **settings)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (conv(4, 4), conv(4, 4, 3)),
        (conv(4, 4), conv(4, 4, stride=2)),
        (conv(4, 4), conv(4, 4, padding=1)),
        (conv(4, 4), conv(4, 4, groups=2)),
        (conv(4, 4, groups=2), conv(4, 4)),
        (conv(4, 4), conv(8, 4)),
        (conv(4, 4), nn.Linear(4, 4)),
        (conv(4, 4), nn.Conv1d(4, 4, 1)),
        (nn.ConvTranspose2d(4, 4, 1), nn.ConvTranspose2d(4, 4, 1)),
        (nn.Linear(8, 1), nn.Linear(1, 8)),
        (nn.Linear(4, 4), nn.ReLU()),
        (nn.BatchNorm2d(4), nn.BatchNorm2d(4)),
        (conv(4, 4), nn.BatchNorm2d(4, track_running_stats=False)),
        (conv(4, 4), nn.InstanceNorm2d(4, affine=True, track_running_stats=True)),
        (nn.Conv2d(4, 4, 1, dtype=torch.complex64), nn.BatchNorm2d(4)),
        (nn.LazyConv2d(4, 1), nn.BatchNorm2d(4)),
    ],
    ids=repr,
)
def test_what_is_left_as_two(first, second) -> None:
    assert merged(first, second) is None


@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, True), (False, False)])
def test_two_linear_layers_as_one(biases) -> None:
    first = nn.Linear(5, 9, biases[0], dtype=torch.float64)
    second = nn.Linear(9, 4, biases[1], dtype=torch.float64).eval()
    both = multiply(first, second)
    batch = tensor_of((3, 5))
    assert_same(both(batch), second(first(batch)))
    assert (both.bias is not None) == any(biases) and not both.training
    assert (both.in_features, both.out_features) == (5, 4)
    assert both.weight.requires_grad
    second.requires_grad_(False)
    assert multiply(first, second).weight.requires_grad
    assert not multiply(first.requires_grad_(False), second).weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_merged_in_half_precision(dtype) -> None:
    first, second = nn.Linear(5, 9).to(dtype), nn.Linear(9, 4).to(dtype)
    norm = nn.BatchNorm1d(9).to(dtype).eval()
    both = multiply(first, second)
    assert {parameter.dtype for parameter in both.parameters()} == {dtype}
    exact = second.double().weight @ first.double().weight
    assert_same(both.weight, exact, 1e-2)
    assert {parameter.dtype for parameter in merged(first.to(dtype), norm).parameters()} == {dtype}


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d])
def test_the_memory_format_is_kept(kind) -> None:
    layer = kind(6, 8, 3)
    last = torch.channels_last if layer.weight.dim() == 4 else torch.channels_last_3d
    norm = NORMS[layer.weight.dim() - 2](8).eval()
    for memory_format in (torch.contiguous_format, last):
        layer = layer.to(memory_format=memory_format)
        assert merged(layer, norm).weight.stride() == layer.weight.stride()
        if kind is not nn.ConvTranspose2d:
            second = kind(8, 8, 1).to(memory_format=memory_format)
            assert merged(layer, second).weight.stride() == layer.weight.stride()
            assert multiply(second, second).weight.stride() == second.weight.stride()


def test_a_form_that_loses_a_factor_is_none() -> None:
    method = METHODS["svd"]()
    forms = [method.fit(nn.Linear(16, 16), WEIGHT_METRIC).build((3,)) for _ in range(2)]
    model = nn.Sequential(*forms).eval()
    batch = tensor_of((4, 16), torch.float32)
    before = model(batch)
    small = merge_pairs(model, [("0.1", "1.0")])
    assert_same(small(batch), before, 1e-5)
    assert type(small[0]) is TwoFactorLinear and small[0].to_dense().out_features == 3
    assert type(small[1]) is nn.Sequential and type(small[1][0]) is nn.Identity
    assert not any(module.training for module in small.modules())


@pytest.mark.parametrize("pair", [("0", "2"), ("0", "elsewhere"), ("1", "0")])
def test_pairs_that_are_none_are_refused(pair) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(8, 8))
    with pytest.raises(PlanError, match=f"'{pair[0]}' and '{pair[1]}'"):
        merge_pairs(model, [pair])


def test_an_analysis_knows_who_reads(analysis) -> None:
    found = {layer.name: layer.reader for layer in analysis.layers}
    assert found == {"first": "between", "between": None, "second": None, "out": None}


def test_a_plan_says_what_the_network_then_costs(analysis, tmp_path) -> None:
    """The readout is gone; what its reader saves besides is not promised."""
    plan = analysis.plan(macs=0.5)
    chosen = {entry.name: entry for entry in plan.layers}
    assert chosen["first"].method == "fewer-units" and chosen["first"].reader == "between"
    model = make_reader()
    small = rankfold.factorize(model, plan)
    assert type(small.first) is nn.LSTM and small.first.hidden_size == chosen["first"].rank[0]
    data = make_sequences()[0]
    macs = count_macs(lambda: small(data)) / len(data)
    assert 0.8 * plan.after.macs < macs <= plan.after.macs <= 0.5 * plan.before.macs
    assert count_parameters(small) <= plan.after.parameters
    assert count_parameters(small.first) == chosen["first"].after.parameters
    with torch.no_grad():
        error = (small(data) - model(data)).norm() / model(data).norm()
    assert error < 0.2
    rankfold.save(small, tmp_path / "small")
    loaded = rankfold.load(tmp_path / "small", Reader)
    assert repr(loaded) == repr(small)
    assert torch.equal(loaded(data), small(data))


def test_merged_or_not_it_is_the_same_network(analysis) -> None:
    plan = analysis.plan(macs=0.6)
    entries = tuple(replace(entry, reader=None) for entry in plan.layers)
    without = rankfold.factorize(make_reader(), plan)
    unmerged = rankfold.factorize(make_reader(), replace(plan, layers=entries))
    assert isinstance(unmerged.first, FewerUnits) and not isinstance(without.first, FewerUnits)
    data = make_sequences()[0]
    assert_same(without(data), unmerged(data), 1e-5)


def test_a_factorized_reader_takes_the_readout_in_too(analysis, tmp_path) -> None:
    overrides = Overrides(
        force={"first": "fewer-units", "between": "svd", "second": "fewer-units"},
        greatest_rank={"*": 16},
    )
    small = rankfold.factorize(make_reader(), analysis.plan(macs=0.9, overrides=overrides))
    units = small.first.hidden_size
    assert isinstance(small.between, TwoFactorLinear)
    assert small.between[0].in_features == 2 * units
    assert isinstance(small.second, FewerUnits)
    rankfold.save(small, tmp_path / "small")
    loaded = rankfold.load(tmp_path / "small", Reader)
    assert torch.equal(loaded(make_sequences()[0]), small(make_sequences()[0]))


def test_readers_survive_the_files(analysis, tmp_path) -> None:
    analysis.save(tmp_path / "analysis")
    again = rankfold.Analysis.load(tmp_path / "analysis")
    plan = again.plan(macs=0.5)
    assert plan == analysis.plan(macs=0.5)
    document = json.loads(json.dumps(plan.to_json()))
    assert Plan.from_json(document) == plan.bare()
    for entry in document["layers"]:  # as in files from before there were readers
        entry.pop("reader")
    assert all(entry.reader is None for entry in Plan.from_json(document).layers)


def test_a_reader_that_is_not_there_is_refused(analysis, tmp_path) -> None:
    plan = analysis.plan(macs=0.5)
    wrong = [replace(entry, reader=entry.reader and "elsewhere") for entry in plan.layers]
    with pytest.raises(PlanError, match="'elsewhere'"):
        rankfold.factorize(make_reader(), replace(plan, layers=tuple(wrong)))
    rankfold.save(rankfold.factorize(make_reader(), plan), tmp_path / "small")
    path = tmp_path / "small" / "plan.json"
    path.write_text(path.read_text().replace('"between"', '"betwixt"'))
    with pytest.raises(CheckpointError, match="another network"):
        rankfold.load(tmp_path / "small", Reader)


def test_a_reader_of_another_kind_or_shape_leaves_the_readout() -> None:
    class Unusual(nn.Linear):
        pass

    layer = nn.LSTM(4, 16)
    for reader in (Unusual(16, 3), nn.Sequential(nn.ReLU(), nn.Linear(16, 3)), nn.Linear(32, 3)):
        form = METHODS["fewer-units"]().fit(layer, WEIGHT_METRIC).build((8,))
        model = nn.ModuleDict({"rnn": form, "reader": copy.deepcopy(reader)})
        left = merge_readouts(model, {"rnn": "reader"})
        assert left.rnn is form and repr(left.reader) == repr(reader)


class Packed(nn.Module):
    """Sequences of different lengths, which zeros fill up, sorted by no one."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 24, bidirectional=True)
        self.out = nn.Linear(48, 5)

    def forward(self, given: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = pack_padded_sequence(given, lengths, enforce_sorted=False)
        return self.out(pad_packed_sequence(self.rnn(packed)[0])[0])


def test_packed_sequences_from_analysis_to_network() -> None:
    model = Packed().eval()
    data = [
        ((tensor_of((7, 3, 4), torch.float32, seed=s), torch.tensor([4, 7, 2])),) for s in range(6)
    ]
    analysis = rankfold.analyze(model, data)
    assert analysis.layers[0].reader is None  # the padding reads them
    small = rankfold.factorize(model, analysis.plan(macs=0.6))
    assert isinstance(small.rnn, FewerUnits)
    ours, theirs = small(*data[0][0]), model(*data[0][0])
    assert ours.shape == theirs.shape and (ours - theirs).norm() < 0.3 * theirs.norm()


def test_a_rule_that_reads_spectra_leaves_recurrent_layers(analysis) -> None:
    plan = analysis.plan(energy=0.5)
    reasons = {entry.name: entry.reason for entry in plan.layers if entry.method is None}
    assert "no spectrum" in reasons["first"]


@pytest.mark.parametrize("dense_pays", [True, False])
def test_what_gains_no_time_is_put_back_with_its_reader(analysis, monkeypatch, dense_pays) -> None:
    """By a clock that likes the dense LSTM, or dislikes it; every network that it times runs."""

    def milliseconds(networks, batch, forward, runtime, progress):
        for network in networks:
            forward(network, batch)
        dense = [network.first.hidden_size == 32 for network in networks]
        return [1.0 if is_dense == dense_pays else 2.0 for is_dense in dense]

    monkeypatch.setattr(search, "_milliseconds", milliseconds)
    plan = analysis.plan(
        macs=0.9, overrides=Overrides(force={"first": "fewer-units", "between": "svd"})
    )
    timed_entries = tuple(
        replace(
            entry,
            before=replace(entry.before, latency_ms=1.0),
            after=replace(entry.after, latency_ms=0.9),
        )
        for entry in plan.layers
    )
    model, data = make_reader(), make_sequences()[0]
    plan = replace(plan, layers=timed_entries)
    timed = search.TimedPlan(plan, rankfold.factorize(model, plan), 1.1)
    timing = NetworkTiming(1.0, 0.0, "contiguous", "a processor", 1)
    found = search._put_back(model, timed, data, run, timing, silent)
    assert isinstance(found.model.between, TwoFactorLinear)
    assert (found.model.first.hidden_size == 32) == dense_pays
    assert found.model(data).shape == model(data).shape
