import copy
import json
from typing import Any

import pytest
import torch
from networks import make_data, make_model
from sparse_networks import BODIES, make, put_to_zero
from torch import nn
from torch.nn.utils import parametrizations

import rankfold
from rankfold import sparsity
from rankfold.cost import count_macs, count_parameters
from rankfold.errors import CheckpointError, ModelError, PlanError, RankfoldError
from rankfold.layers import HollowLayer
from rankfold.measure import output_error

OF_CHANNELS = [
    (name, kind)
    for name, (_, kinds) in BODIES.items()
    for kind in ("filters", "channels")
    if kind in kinds
]


def count_groups(model: nn.Module, batch: Any, kind: sparsity.Kind) -> int:
    try:
        return sparsity.GroupLasso(model, batch, over=(kind,)).groups[0].count
    except RankfoldError:
        return 0


@pytest.mark.parametrize(("name", "kind"), OF_CHANNELS)
def test_every_group_that_is_zero_leaves_and_the_outputs_stay(name, kind) -> None:
    model, batch = make(name)
    lasso = sparsity.GroupLasso(model, batch, over=(kind,))
    gone = put_to_zero(model, lasso, 0.4)
    assert gone > 0
    state = {key: value.clone() for key, value in model.state_dict().items()}
    small = sparsity.remove_zero_groups(model, batch)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert small.training == model.training
    other = torch.randn_like(batch)
    with torch.no_grad():
        assert output_error(model(other), small(other)) < 1e-12
    assert count_groups(small, batch, kind) == lasso.groups[0].count - gone
    assert not sparsity.find_zero_groups(small, batch).kept


@pytest.mark.parametrize("name", BODIES)
def test_a_network_without_zeros_stays(name) -> None:
    model, batch = make(name)
    used = sparsity.find_zero_groups(model, batch)
    small = sparsity.remove(model, used)
    with torch.no_grad():
        assert output_error(model(batch), small(batch)) < 1e-12
    # Some bodies make channels that nobody reads: nothing else goes.
    assert all(one.trimmed is None and not one.hollow for one in used.kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_dtype_memory_format_and_gradients_are_kept(dtype, memory_format) -> None:
    model, batch = make("a residual block")
    model, batch = model.to(dtype, memory_format=memory_format), batch.to(dtype)
    model.first.weight.requires_grad_(False)
    put_to_zero(model, sparsity.GroupLasso(model, batch), 0.5)
    small = sparsity.remove_zero_groups(model.train(), batch)
    assert small.training
    for name, parameter in small.named_parameters():
        assert parameter.dtype == dtype
        assert parameter.requires_grad == (name != "first.weight")
    assert small.second.weight.shape != model.second.weight.shape
    assert small.second.weight.is_contiguous(memory_format=memory_format)
    with torch.no_grad():
        error = output_error(model.eval()(batch), small.eval()(batch))
    assert error < (1e-5 if dtype == torch.float32 else 0.05)


def test_what_reads_zeros_and_what_makes_what_nobody_reads_go_on_and_on() -> None:
    """Of a chain, a last layer that reads one channel leaves a path of one channel behind."""
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4))).double()
    with torch.no_grad():
        model[3].weight[:, 1:] = 0
        for layer in model[1:3]:
            layer.weight.copy_(torch.eye(8))
    small = sparsity.remove_zero_groups(model, torch.randn(2, 8).double())
    assert [tuple(one.weight.shape) for one in small] == [(1, 8), (1, 1), (1, 1), (8, 1)]


@pytest.mark.parametrize("name", ["a residual block", "two residual blocks", "norms before"])
def test_branches_that_are_zero_are_hollow(name) -> None:
    model, batch = make(name)
    lasso = sparsity.GroupLasso(model, batch, over=("depth",), strength=1e9)
    lasso(model, 1.0)
    zero, count = lasso.zero_groups(model)["depth"]
    assert zero == count == {"two residual blocks": 2}.get(name, 1)
    small = sparsity.remove_zero_groups(model, batch)
    wider = torch.randn(3, 6, 11, 13).double()
    with torch.no_grad():
        assert output_error(model(wider), small(wider)) < 1e-12
    hollow = {key for key, one in small.named_modules() if type(one) is HollowLayer}
    assert (
        hollow
        == {
            "a residual block": {"first", "second"},
            "two residual blocks": {"second", "third", "reflected"},
            "norms before": {"third"},
        }[name]
    )
    macs = [count_macs(lambda one=one: one(batch)) for one in (model, small)]
    assert macs[1] < macs[0]


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [2, 4, "same", 0])
def test_places_at_the_ends_of_kernels_are_trimmed(mode, padding) -> None:
    layer = nn.Conv2d(3, 4, (5, 3), padding=padding, dilation=2, padding_mode=mode).double()
    with torch.no_grad():
        layer.weight[:, :, [0, 4]] = 0
    model = nn.Sequential(layer, nn.ReLU())
    batch = torch.randn(2, 3, 12, 11).double()
    small = sparsity.remove_zero_groups(model, batch)
    assert small[0].kernel_size == ((5, 3) if padding == 0 else (3, 3))
    with torch.no_grad():
        assert output_error(model(batch), small(batch)) < 1e-12


def test_a_kernel_loses_no_more_than_its_padding_or_its_middle() -> None:
    layer = nn.Conv1d(2, 2, 7, padding=1).double()
    with torch.no_grad():
        layer.weight[:, :, [0, 1, 5, 6]] = 0
    batch = torch.randn(1, 2, 9).double()
    assert sparsity.remove_zero_groups(nn.Sequential(layer), batch)[0].kernel_size == (5,)
    layer = nn.Conv1d(2, 2, 3, padding=1, bias=True).double()
    with torch.no_grad():
        layer.weight[:, :, 1:] = 0  # the first place is used: nothing can go
    small = sparsity.remove_zero_groups(nn.Sequential(layer), batch)
    assert small[0].kernel_size == (3,)


def test_a_channel_that_is_constant_stays() -> None:
    model, batch = make("one after the other")
    with torch.no_grad():
        model.first.weight[1:3] = 0
        model.norm.running_mean[2], model.norm.bias[2] = 0, 0
    small = sparsity.remove_zero_groups(model, batch)
    assert small.first.out_channels == 5


def test_a_norm_that_scales_by_zero_has_its_filter_removed() -> None:
    model, batch = make("one after the other")
    with torch.no_grad():
        model.norm.weight[1], model.norm.bias[1] = 0, 0
    small = sparsity.remove_zero_groups(model, batch)
    assert small.first.out_channels == small.norm.num_features == small.out.in_channels == 5


CHANGES = {
    "a hook": lambda model: model.first.register_forward_hook(lambda *_: None),
    "a parametrization": lambda model: parametrizations.weight_norm(model.first),
    "a shared weight": lambda model: setattr(model.third, "weight", model.first.weight),
    "a forward of its own": lambda model: setattr(model.first, "forward", model.first.forward),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_modules_that_must_stay_as_they_are(change) -> None:
    model, batch = make("one after the other")
    change(model)
    with torch.no_grad():
        model.norm.weight[1], model.norm.bias[1] = 0, 0
    small = sparsity.remove_zero_groups(model, batch)
    assert small.norm.num_features == 6


def test_attention_stays_and_the_layers_between_go() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 32, batch_first=True, dropout=0.0)
    model = nn.Sequential(layer, nn.Linear(8, 3)).double().eval()
    batch = torch.randn(2, 5, 8).double()
    lasso = sparsity.GroupLasso(model, batch, over=("filters",))
    assert lasso.groups[0].count == 32
    gone = put_to_zero(model, lasso, 0.5)
    small = sparsity.remove_zero_groups(model, batch)
    assert small[0].linear1.out_features == small[0].linear2.in_features == 32 - gone
    with torch.no_grad():
        assert output_error(model(batch), small(batch)) < 1e-12


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_stay(kind) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.recurrent = nn.Linear(4, 6), kind(6, 5, batch_first=True)
            self.hidden, self.after = nn.Linear(5, 7), nn.Linear(7, 2)

        def forward(self, tensor: torch.Tensor) -> torch.Tensor:
            return self.after(self.hidden(self.recurrent(self.before(tensor))[0]).relu())

    model, batch = Network().double(), torch.randn(2, 3, 4).double()
    lasso = sparsity.GroupLasso(model, batch, over=("filters",))
    assert lasso.groups[0].count == 7
    gone = put_to_zero(model, lasso, 0.5)
    with torch.no_grad():
        model.before.weight[0], model.before.bias[0] = 0, 0
    small = sparsity.remove_zero_groups(model, batch)
    assert (small.before.out_features, small.hidden.out_features) == (6, 7 - gone)
    with torch.no_grad():
        assert output_error(model(batch), small(batch)) < 1e-12


def test_a_forward_of_the_users_and_batches_of_keywords() -> None:
    model, batch = make("one after the other")
    lasso = sparsity.GroupLasso(
        model, {"x": batch}, forward=lambda network, given: network(given["x"])
    )
    put_to_zero(model, lasso, 0.5)
    small = sparsity.remove_zero_groups(model, {"given": batch, "labels": torch.zeros(2)})
    assert small.first.out_channels < 6


def test_networks_that_cannot_be_looked_into_are_refused() -> None:
    model, batch = make("one after the other")
    with pytest.raises(ModelError, match="the model fails on batch 0"):
        sparsity.remove_zero_groups(model, batch[:, :3])
    scripted = nn.Sequential(torch.jit.script(nn.Linear(6, 6)))
    with pytest.raises(ModelError, match="TorchScript"):
        sparsity.remove_zero_groups(scripted, batch)


def sparse(make_layer=make_model) -> tuple[nn.Module, torch.Tensor]:
    """A factorized network, some of whose rank-one terms, filters and channels are gone."""
    model, data = make_layer(), make_data()
    plan = rankfold.analyze(model, data, metric="weight").plan(macs=0.5)
    small = rankfold.factorize(model, plan)
    for kind in ("ranks", "filters"):
        put_to_zero(small, sparsity.GroupLasso(small, data[0], over=(kind,)), 0.4)
    return small, data[0]


def test_a_factorized_network_is_saved_and_loaded(tmp_path) -> None:
    zeros, batch = sparse()
    small = sparsity.remove_zero_groups(zeros, batch)
    assert count_parameters(small) < 0.7 * count_parameters(zeros)
    (removal,) = rankfold.record_of(small).removed
    assert sparsity.Removal.from_json(removal.to_json()) == removal
    with torch.no_grad():
        assert output_error(zeros(batch), small(batch)) < 1e-5
    rankfold.save(small, tmp_path / "small")
    loaded = rankfold.load(tmp_path / "small", make_model)
    with torch.no_grad():
        assert torch.equal(loaded(batch), small(batch))
    assert rankfold.record_of(loaded).removed == (removal,)
    assert repr(loaded) == repr(small)
    rankfold.recover(small, make_data(), teacher=make_model(), epochs=1)
    # Factorized layers are still of their forms.
    forms = [one for one in small.modules() if hasattr(one, "to_dense")]
    assert forms
    for form in forms:
        given = torch.randn(1, next(form.parameters()).shape[1], 8, 8)
        if isinstance(form[0], nn.Linear):
            given = given[:, :, 0, 0]
        with torch.no_grad():
            assert output_error(form(given), form.to_dense()(given)) < 1e-5


@pytest.mark.parametrize("order", ["removed, merged", "merged, removed", "removed twice"])
def test_what_was_done_in_turn_is_loaded_in_turn(tmp_path, order) -> None:
    zeros, batch = sparse()
    if order == "removed, merged":
        small = rankfold.merge_adjacent(sparsity.remove_zero_groups(zeros, batch), batch)
    elif order == "merged, removed":
        small = sparsity.remove_zero_groups(rankfold.merge_adjacent(zeros, batch), batch)
    else:
        once = sparsity.remove_zero_groups(zeros, batch)
        put_to_zero(once, sparsity.GroupLasso(once, batch, over=("channels",)), 0.4)
        small = rankfold.merge_adjacent(sparsity.remove_zero_groups(once, batch), batch)
    with torch.no_grad():
        if order != "removed twice":
            assert output_error(zeros(batch), small(batch)) < 1e-5
        rankfold.save(small, tmp_path / "small")
        loaded = rankfold.load(tmp_path / "small", make_model)
        assert torch.equal(loaded(batch), small(batch))
    assert rankfold.record_of(loaded).merged == rankfold.record_of(small).merged
    assert rankfold.record_of(loaded).removed == rankfold.record_of(small).removed


def edited(removed: list[dict], change) -> list[dict]:
    removed = copy.deepcopy(removed)
    change(removed)
    return removed


DAMAGE = {
    "no list": (lambda r: {"kept": 1}, "'removed' is"),
    "no removal": (lambda r: [3], "is none"),
    "of a negative number of pairs": (
        lambda r: edited(r, lambda d: d[0].update(merged_before=-1)),
        "is none",
    ),
    "of more pairs than there are": (
        lambda r: edited(r, lambda d: d[0].update(merged_before=10**9)),
        "after 1000000000 merged pairs",
    ),
    "no module": (
        lambda r: edited(r, lambda d: d[0]["kept"][0].update(module="nowhere")),
        "'nowhere'",
    ),
    "one twice": (
        lambda r: edited(r, lambda d: d[0]["kept"].append(d[0]["kept"][0])),
        "twice",
    ),
    "a channel that is not there": (
        lambda r: edited(r, lambda d: d[0]["kept"][0].update(outputs=[0, 10**12])),
        "cannot be kept",
    ),
    "no channel": (
        lambda r: edited(r, lambda d: d[0]["kept"][0].update(outputs=[])),
        "'outputs' of",
    ),
    "no numbers": (
        lambda r: edited(r, lambda d: d[0]["kept"][0].update(outputs=[True])),
        "'outputs' of",
    ),
    "more than there were": (
        lambda r: edited(r, lambda d: d[0]["kept"][0].update(outputs=None, inputs=None)),
        "shape",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_record_of_what_was_removed_is_refused(tmp_path, damage, message) -> None:
    zeros, batch = sparse()
    rankfold.save(sparsity.remove_zero_groups(zeros, batch), tmp_path / "small")
    path = tmp_path / "small" / "plan.json"
    document = json.loads(path.read_text())
    document["removed"] = damage(document["removed"])
    path.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=message):
        rankfold.load(tmp_path / "small", make_model)


def test_a_removal_is_done_again_to_a_network_of_its_shapes_alone() -> None:
    model, batch = make("one after the other")
    put_to_zero(model, sparsity.GroupLasso(model, batch), 0.5)
    removal = sparsity.find_zero_groups(model, batch)
    other, _ = make("one after the other", seed=3)
    assert repr(sparsity.remove(other, removal)) == repr(sparsity.remove(model, removal))
    with pytest.raises(PlanError, match="no 'first'"):
        sparsity.remove(nn.Linear(3, 3), removal)


def test_a_removal_with_nothing_to_remove_is_empty() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    assert sparsity.find_zero_groups(model, torch.randn(1, 3)) == sparsity.Removal()
