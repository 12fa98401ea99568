import copy
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import make_data, make_model
from tensors import seeds, tensor_of
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from typer.testing import CliRunner

import rankfold
from rankfold.analysis import Overrides
from rankfold.cli import app
from rankfold.cost import count_macs, count_parameters
from rankfold.errors import CheckpointError, ModelError, PlanError
from rankfold.measure import output_error
from rankfold.methods import METHODS, WEIGHT_METRIC


def with_statistics(model: nn.Module, seed: int = 0) -> nn.Module:
    """In eval mode, its batch norms with statistics and weights far from 0 and 1."""
    for index, module in enumerate(model.modules()):
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            for tensor in (module.running_mean, module.weight, module.bias):
                if tensor is not None:
                    tensor.data.copy_(tensor_of(tensor.shape, seed=seed + index))
            module.running_var.copy_(tensor_of(module.running_var.shape, seed=seed).square() + 0.1)
    return model.eval()


class Body(nn.Module):
    """Layers of all kinds, of 6 channels, and what is done with them."""

    def __init__(self, body: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.point = nn.Conv2d(6, 6, 1)
        self.grouped = nn.Conv2d(6, 6, 3, groups=3)
        self.wide = nn.Conv2d(6, 6, 3)
        self.transposed = nn.ConvTranspose2d(6, 6, 3, groups=2)
        self.linear = nn.Linear(6, 6)
        self.head = nn.Linear(6, 6)
        self.norm = nn.BatchNorm2d(6, affine=False)
        self.other = nn.BatchNorm2d(6)
        self.flat = nn.BatchNorm1d(6)
        self.batch_statistics = nn.BatchNorm2d(6, track_running_stats=False)
        self.identity, self.dropout = nn.Identity(), nn.Dropout(inplace=True)
        self.relu = nn.ReLU(inplace=True)
        self.body = body
        self.double()

    def forward(self, given: torch.Tensor) -> Any:
        return self.body(self, given)


def merged(
    body: Callable[[Any, torch.Tensor], Any],
    change: Callable[[Any], Any] = lambda model: None,
    merge: Callable[..., nn.Module] = rankfold.merge_adjacent,
) -> set[str]:
    """The modules that are no more, in a network that gives the same outputs as before."""
    model = with_statistics(Body(body))
    change(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    batch = tensor_of((2, 6, 6, 6), seed=7)
    small = merge(model, batch)
    with torch.no_grad():
        assert output_error(model(batch), small(batch)) < 1e-12
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module.training for module in small.modules())
    assert not any(module._forward_hooks for module in small.modules()) or model.conv._forward_hooks
    before = dict(model.named_modules())
    return {
        name
        for name, module in small.named_modules()
        if type(module) is nn.Identity and not isinstance(before[name], nn.Identity)
    }


def rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.mean((2, 3))


FOLDED = {
    "into a convolution": (lambda self, x: self.norm(self.conv(x)), {"norm"}),
    "with an affine map and an activation after": (
        lambda self, x: self.relu(self.other(self.wide(x))),
        {"other"},
    ),
    "into a grouped one": (lambda self, x: self.other(self.grouped(x)), {"other"}),
    "into a transposed one": (lambda self, x: self.other(self.transposed(x)), {"other"}),
    "into a linear layer": (lambda self, x: self.flat(self.linear(rows(x))), {"flat"}),
    "through what does nothing": (
        lambda self, x: self.norm(self.dropout(self.identity(self.conv(x)))),
        {"norm"},
    ),
    "through a function that does nothing": (
        lambda self, x: self.norm(functional.dropout(self.conv(x), training=False).contiguous()),
        {"norm"},
    ),
    "by name": (lambda self, x: self.norm(input=self.conv(input=x)), {"norm"}),
    "forwards": (lambda self, x: self.point(self.norm(x.relu())), {"norm"}),
    "forwards, into a 3x3": (lambda self, x: self.wide(self.norm(x.relu())), {"norm"}),
    "forwards, into a grouped one": (lambda self, x: self.grouped(self.norm(x.relu())), {"norm"}),
    "forwards, into a linear layer": (lambda self, x: self.linear(self.flat(rows(x))), {"flat"}),
    "forwards, past a residual": (lambda self, x: x + self.wide(self.norm(x)).mean(), {"norm"}),
    "of two": (lambda self, x: self.other(self.norm(self.conv(x))), {"norm", "other"}),
    "called twice, both": (
        lambda self, x: self.norm(self.conv(x)) + self.norm(self.conv(x + 1)),
        {"norm"},
    ),
}
NOT_FOLDED = {
    "an activation between": lambda self, x: self.norm(self.relu(self.conv(x))),
    "a functional one": lambda self, x: self.norm(functional.relu(self.conv(x))),
    "an in-place operator": lambda self, x: self.norm(self.conv(x).add_(1)),
    "an in-place function": lambda self, x: self.norm(torch.relu_(self.conv(x))),
    "a residual": lambda self, x: (lambda h: self.norm(h) + h)(self.conv(x)),
    "a residual added in place": lambda self, x: (lambda h: h.add_(self.norm(h)))(self.conv(x)),
    "two batch norms": lambda self, x: (lambda h: self.norm(h) + self.other(h))(self.conv(x)),
    "another layer too": lambda self, x: (lambda h: self.norm(h) * self.wide(h).mean())(
        self.conv(x)
    ),
    "the caller too": lambda self, x: (lambda h: (self.norm(h), h))(self.conv(x)),
    "one of two calls": lambda self, x: self.norm(self.conv(x)) + self.conv(x + 1),
    "of another call too": lambda self, x: self.norm(self.conv(x)) + self.norm(x),
    "one output read twice": lambda self, x: (lambda h: self.norm(h).relu_() + self.norm(h))(
        self.conv(x)
    ),
    "a view": lambda self, x: self.norm(self.conv(x)[:, :]),
    "a transposition": lambda self, x: self.norm(self.conv(x).mT),
    "channels of another axis": lambda self, x: self.flat(self.linear(x[:, :, 0])),
    "a flattening": lambda self, x: self.flat(self.conv(x).flatten(2)),
    "a list": lambda self, x: self.norm(torch.cat([self.conv(x)])),
    "statistics of the batch": lambda self, x: self.batch_statistics(self.conv(x)),
    "a weight used elsewhere": lambda self, x: (
        self.norm(self.conv(x)) + functional.conv2d(x, self.conv.weight, padding=1)
    ),
    "a weight asked for": lambda self, x: self.other(self.conv(x)).to(self.other.weight.dtype),
    "zeros around, forwards": lambda self, x: self.conv(self.norm(x.relu())),
    "transposed, forwards": lambda self, x: self.transposed(self.norm(x.relu())),
    "dropped in eval mode": lambda self, x: self.norm(functional.dropout(self.conv(x), 0.5)),
    "dropped in place in eval mode": lambda self, x: self.norm(
        functional.dropout(self.conv(x), 0.5, True, True)
    ),
}


@pytest.mark.parametrize(("body", "gone"), FOLDED.values(), ids=FOLDED)
def test_batch_norms_that_are_folded(body, gone) -> None:
    assert merged(body, merge=rankfold.fold_batch_norms) == gone


@pytest.mark.parametrize("body", NOT_FOLDED.values(), ids=NOT_FOLDED)
def test_batch_norms_that_are_left(body) -> None:
    model = with_statistics(Body(body))
    small = rankfold.fold_batch_norms(model, tensor_of((2, 6, 6, 6)))
    assert repr(small) == repr(model)


CHANGES = {
    "a hook of the layer": lambda model: model.conv.register_forward_hook(lambda *_: None),
    "a hook of the batch norm": lambda model: model.norm.register_forward_pre_hook(lambda *_: None),
    "a hook between": lambda model: model.identity.register_forward_hook(lambda *_: None),
    "a backward hook": lambda model: model.norm.register_full_backward_hook(lambda *_: None),
    "a parametrization": lambda model: parametrizations.weight_norm(model.conv),
    "an old weight norm": lambda model: torch.no_grad()(nn.utils.weight_norm)(model.conv),
    "a shared weight": lambda model: setattr(model.wide, "weight", model.conv.weight),
    "a forward of its own": lambda model: setattr(model.conv, "forward", model.conv.forward),
    "a batch norm that stays in training mode": lambda model: setattr(
        model.norm, "train", lambda mode=True: model.norm
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_modules_that_must_stay_as_they_are(change) -> None:
    def body(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.identity(self.conv(x)))

    model = with_statistics(Body(body))
    if "training" in next(name for name, one in CHANGES.items() if one is change):
        model.norm.training = True
    change(model)
    batch = tensor_of((2, 6, 6, 6))
    small = rankfold.fold_batch_norms(model, batch)
    assert isinstance(small.norm, nn.BatchNorm2d)


MERGED = {
    "two linear layers": (lambda self, x: self.head(self.linear(rows(x))), {"head"}),
    "on the last axis of any tensor": (lambda self, x: self.head(self.linear(x)), {"head"}),
    "a convolution and a 1x1": (lambda self, x: self.point(self.conv(x)), {"point"}),
    "a batch norm between": (
        lambda self, x: self.point(self.norm(self.conv(x))),
        {"norm", "point"},
    ),
    "batch norms all around": (
        lambda self, x: self.other(self.point(self.norm(self.wide(x)))),
        {"norm", "other", "point"},
    ),
    "dropout between": (lambda self, x: self.head(self.dropout(self.linear(rows(x)))), {"head"}),
    "the sum with something read before": (
        lambda self, x: x + self.point(self.conv(x)),
        {"point"},
    ),
}
NOT_MERGED = {
    "an activation": lambda self, x: self.point(functional.relu(self.conv(x))),
    "a residual": lambda self, x: (lambda h: h + self.point(h))(self.conv(x)),
    "a sum": lambda self, x: self.point(x + self.conv(x)),
    "a flattening": lambda self, x: self.head(self.linear(x).flatten(0, 1)),
    "a permutation": lambda self, x: self.head(self.linear(x).permute(1, 0, 2, 3)),
    "a reshaping to the same": lambda self, x: self.head(self.linear(x).view(x.shape)),
    "a shape asked for": lambda self, x: (lambda h: self.head(h) * h.shape[-1])(self.linear(x)),
    "a 3x3 after": lambda self, x: self.wide(self.point(x)),
    "grouped before": lambda self, x: self.point(self.grouped(x)),
    "grouped after": lambda self, x: self.grouped(self.point(x)),
    "of two kinds": lambda self, x: self.linear(self.point(x)),
    "transposed": lambda self, x: self.point(self.transposed(x)),
    "one of two calls": lambda self, x: self.point(self.conv(x)) + self.conv(x),
    "itself": lambda self, x: self.point(self.point(x)),
}


@pytest.mark.parametrize(("body", "gone"), MERGED.values(), ids=MERGED)
def test_layers_that_become_one(body, gone) -> None:
    assert merged(body) == gone
    # For batch norms alone, only those.
    assert merged(body, merge=rankfold.fold_batch_norms) == gone - {"point", "head"}


@pytest.mark.parametrize("body", NOT_MERGED.values(), ids=NOT_MERGED)
def test_layers_that_stay_two(body) -> None:
    assert merged(body) == set()


class Chain(nn.Sequential):
    """Linear layers and batch norms of these widths, of which every other may be narrow."""

    def __init__(self, widths: list[int], norms: list[bool]) -> None:
        super().__init__()
        for inputs, outputs, norm in zip(widths, widths[1:], norms, strict=False):
            self.append(nn.Linear(inputs, outputs))
            if norm:
                self.append(nn.BatchNorm1d(outputs))
        self.double()


@given(
    st.lists(st.integers(1, 12), min_size=2, max_size=7),
    st.lists(st.booleans(), min_size=6, max_size=6),
    seeds,
)
def test_chains_of_any_widths_cost_no_more(widths, norms, seed) -> None:
    model = with_statistics(Chain(widths, norms), seed)
    batch = tensor_of((3, widths[0]), seed=seed)
    small = rankfold.merge_adjacent(model, batch)
    with torch.no_grad():
        assert output_error(model(batch), small(batch)) < 1e-9
    assert count_parameters(small) <= count_parameters(model)
    assert count_macs(lambda: small(batch)) <= count_macs(lambda: model(batch))
    left = [layer for layer in small if isinstance(layer, nn.Linear)]
    for first, second in pairwise(left):
        product = first.in_features * second.out_features
        assert product > first.weight.numel() + second.weight.numel()


class Bottlenecks(nn.Module):
    """Two inverted residuals, linear between, of which the second adds its input or does not."""

    def __init__(self, residual: bool) -> None:
        super().__init__()
        self.residual = residual

        def block(inputs: int, outputs: int) -> nn.Sequential:
            wide = 4 * inputs
            return nn.Sequential(
                nn.Conv2d(inputs, wide, 1, bias=False),
                nn.BatchNorm2d(wide),
                nn.ReLU6(inplace=True),
                nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False),
                nn.BatchNorm2d(wide),
                nn.ReLU6(inplace=True),
                nn.Conv2d(wide, outputs, 1, bias=False),
                nn.BatchNorm2d(outputs),
            )

        self.first, self.second = block(16, 24), block(24, 24)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.first(images)
        return self.second(hidden) + (hidden if self.residual else 0)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_bottleneck_that_was_factorized(residual, dtype, tmp_path) -> None:
    """Of the factors of projection and expansion, of one rank, the middle two are taken in."""

    def make() -> nn.Module:
        return with_statistics(Bottlenecks(residual)).to(dtype)

    torch.manual_seed(0)
    batch = tensor_of((2, 16, 8, 8)).to(dtype)
    model = make()
    projection, expansion = "first.6", "second.0"
    plan = rankfold.analyze(model, [batch], metric="weight").plan(
        macs=0.9,
        overrides=Overrides(
            force={projection: "svd", expansion: "svd"}, greatest_rank={projection: 8, expansion: 8}
        ),
    )
    small = rankfold.factorize(model, plan)
    one = rankfold.merge_adjacent(small, batch)
    with torch.no_grad():
        assert output_error(small(batch), one(batch)) < torch.finfo(dtype).eps ** 0.5
    factors = [*one.first[6], *one.second[0]]
    shapes = [tuple(one.weight.shape[:2]) for one in factors if hasattr(one, "weight")]
    ends = [(24, 8), (8, 24)] if residual else []
    assert shapes == [(8, 64), *ends, (96, 8)]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in one.modules())
    assert count_parameters(one) < count_parameters(small)
    twice = rankfold.merge_adjacent(rankfold.fold_batch_norms(small, batch), batch)
    assert repr(twice) == repr(one) and rankfold.record_of(small).merged == ()
    rankfold.save(twice, tmp_path / "twice")
    assert repr(rankfold.load(tmp_path / "twice", make)) == repr(one)
    rankfold.save(one, tmp_path / "one")
    loaded = rankfold.load(tmp_path / "one", make)
    assert repr(loaded) == repr(one)
    with torch.no_grad():
        assert torch.equal(loaded(batch), one(batch))
    assert rankfold.record_of(loaded).merged == rankfold.record_of(one).merged
    rankfold.save(loaded, tmp_path / "again")
    assert (tmp_path / "one/model.safetensors").read_bytes() == (
        tmp_path / "again/model.safetensors"
    ).read_bytes()


@pytest.fixture(scope="module")
def folded() -> nn.Module:
    model, batch = make_model(), make_data()[0]
    plan = rankfold.analyze(model, [batch], metric="weight").plan(fraction=0.2)
    return rankfold.fold_batch_norms(rankfold.factorize(model, plan), batch)


@pytest.mark.parametrize("value", ["norm", [["norm"]], [["stem.1", 3]], [["stem.1", "out"]], {}])
def test_a_file_with_other_pairs_is_refused(folded, tmp_path: Path, value: object) -> None:
    rankfold.save(folded, tmp_path / "small")
    path = tmp_path / "small/plan.json"
    document = json.loads(path.read_text())
    assert document["merged"] == [["stem.1", "norm"]]
    path.write_text(json.dumps(document | {"merged": value}))
    with pytest.raises(CheckpointError, match="merged"):
        rankfold.load(tmp_path / "small", make_model)


def test_a_file_from_before_there_were_pairs_is_read(folded, tmp_path: Path) -> None:
    model, batch = make_model(), make_data()[0]
    plan = rankfold.record_of(folded).plan
    small = rankfold.factorize(model, plan)
    rankfold.save(small, tmp_path / "small")
    path = tmp_path / "small/plan.json"
    document = json.loads(path.read_text())
    assert document.pop("merged") == []
    path.write_text(json.dumps(document))
    with torch.no_grad():
        assert torch.equal(rankfold.load(tmp_path / "small", make_model)(batch), small(batch))


def test_a_network_of_the_users_own_is_folded_and_not_saved(tmp_path) -> None:
    small = rankfold.fold_batch_norms(make_model(), make_data()[0])
    assert isinstance(small.norm, nn.Identity)
    with pytest.raises(PlanError, match="not made by"):
        rankfold.save(small, tmp_path / "small")


def test_every_place_of_a_shared_layer_has_the_folded_one() -> None:
    layer, norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
    model = with_statistics(nn.Sequential(layer, norm, nn.ReLU(), layer, norm).double())
    batch = tensor_of((2, 4, 5, 5))
    small = rankfold.fold_batch_norms(model, batch)
    assert small[0] is small[3] and type(small[1]) is type(small[4]) is nn.Identity
    with torch.no_grad():
        assert output_error(model(batch), small(batch)) < 1e-12


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_unbatched_inputs_have_channels_elsewhere(dimensions) -> None:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    norms = (None, nn.BatchNorm1d, nn.BatchNorm2d)[dimensions - 1]
    point = kind(4, 4, 1)
    between: nn.Module = nn.Identity() if norms is None else norms(4)
    model = with_statistics(nn.Sequential(kind(4, 4, 1), between, point).double())
    batch = tensor_of((4, *[4] * dimensions))
    small = rankfold.merge_adjacent(model, batch)
    with torch.no_grad():
        assert output_error(model(batch), small(batch)) < 1e-12
    assert (type(small[2]) is nn.Identity) == (norms is None)


def test_a_readout_is_a_linear_layer_as_well() -> None:
    form = METHODS["fewer-units"]().fit(nn.LSTM(4, 16), WEIGHT_METRIC).build((8,))

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = form, nn.Linear(16, 3)

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            return self.out(self.rnn(given)[0])

    model, batch = Reads().eval(), tensor_of((5, 2, 4), torch.float32)
    small = rankfold.merge_adjacent(model, batch)
    assert small.rnn.readout.out_features == 3 and type(small.out) is nn.Identity
    with torch.no_grad():
        assert output_error(model(batch), small(batch)) < 1e-5


def test_a_product_that_half_precision_cannot_hold_stays_two() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    model[1].running_var.fill_(1e-6)
    model[1].eps = 0.0
    with torch.no_grad():
        model[0].weight.fill_(100.0)
        model[0].bias.fill_(0.0)
    small = rankfold.fold_batch_norms(model.half(), torch.zeros(2, 4).half())
    assert isinstance(small[1], nn.BatchNorm1d)


class Scripted(nn.Module):
    """Reads a convolution's output where nothing of torch's own for Python sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.unseen = torch.jit.script(nn.ReLU())

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        hidden = self.conv(given)
        return self.norm(hidden) + self.unseen(hidden)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_what_cannot_be_seen_is_noticed_by_its_outputs() -> None:
    with pytest.raises(ModelError, match="other outputs"):
        rankfold.fold_batch_norms(
            with_statistics(Scripted()), tensor_of((2, 6, 4, 4), torch.float32)
        )


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_networks_that_cannot_be_merged_are_refused() -> None:
    model, batch = make_model(), make_data()[0]
    with pytest.raises(ModelError, match="fails on batch 0"):
        rankfold.fold_batch_norms(model, batch[:, :2])
    with pytest.raises(ModelError, match="TorchScript"):
        rankfold.merge_adjacent(torch.jit.trace(model, batch), batch)
    broken = copy.deepcopy(model)
    broken.head.weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match="NaN"):
        rankfold.fold_batch_norms(broken, batch)
    with pytest.raises(ModelError, match="meta device"):
        rankfold.fold_batch_norms(copy.deepcopy(model).to("meta"), batch)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_transformer_on_its_fast_path_is_left_in_peace() -> None:
    """Off it, as while it is watched, what it gives at the padding is not zero."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.first, self.second = nn.Linear(8, 4), nn.Linear(4, 8)
            self.encoder = nn.TransformerEncoder(layer, 2)

        def forward(self, given: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
            return self.encoder(self.second(self.first(given)), src_key_padding_mask=padding)

    model = Encoder().eval()
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    inputs = tensor_of((3, 5, 8), torch.float32), padding
    small = rankfold.merge_adjacent(model, (inputs,))
    assert type(small.second) is nn.Identity and small.first.out_features == 8
    with torch.no_grad():
        assert (model(*inputs)[1, 3:] == 0).all()
        assert output_error(model(*inputs), small(*inputs)) < 1e-5


def test_random_draws_of_the_network_are_the_same() -> None:
    model = with_statistics(Body(lambda self, x: self.norm(self.conv(x + torch.rand_like(x)))))
    before = torch.get_rng_state()
    small = rankfold.fold_batch_norms(model, tensor_of((2, 6, 6, 6)))
    assert isinstance(small.norm, nn.Identity) and torch.equal(torch.get_rng_state(), before)


def test_a_network_may_use_inference_mode_itself() -> None:
    class Inferring(Body):
        @torch.inference_mode()
        def forward(self, given: torch.Tensor) -> Any:
            return super().forward(given)

    model = with_statistics(Inferring(lambda self, x: self.norm(self.conv(x))))
    assert isinstance(rankfold.fold_batch_norms(model, tensor_of((2, 6, 6, 6))).norm, nn.Identity)


def test_frozen_layers_stay_frozen_and_the_others_can_be_trained() -> None:
    model = with_statistics(Body(lambda self, x: self.norm(self.conv(x))))
    batch = tensor_of((2, 6, 6, 6))
    assert rankfold.fold_batch_norms(model, batch).conv.weight.requires_grad
    model.requires_grad_(False)
    small = rankfold.fold_batch_norms(model, batch)
    assert not small.conv.weight.requires_grad and not small.conv.bias.requires_grad


def test_compress_can_merge_at_the_end(tmp_path) -> None:
    command = (
        "compress networks:make_model --data networks:make_data --macs 0.5 --epochs 0 "
        f"--loss-metric weight --merge --json --out {tmp_path / 'small'}"
    )
    done = CliRunner().invoke(app, command.split())
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "small/plan.json").read_text())
    assert any("norm" in pair for pair in document["merged"])
    loaded = rankfold.load(tmp_path / "small", make_model)
    assert isinstance(loaded.norm, nn.Identity)
