import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import make_data, make_labelled, make_model
from sparse_networks import make
from tensors import seeds, tensor_of
from torch import nn

import rankfold
from rankfold import sparsity
from rankfold.errors import ModelError, RankfoldError
from rankfold.layers import CPConvolution, TuckerConvolution, TwoFactorConvolution
from rankfold.measure import output_error
from rankfold.sparsity.groups import KINDS


def mlp(seed: int = 0) -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(tensor_of(parameter.shape, seed=seed))
    return model


@settings(max_examples=10)
@given(seeds, st.floats(0, 0.3))
def test_the_step_is_the_minimum_of_the_penalty_plus_the_squared_distance(seed, strength) -> None:
    """The definition of a proximal step, group by group, by the closed form of Yuan and Lin."""
    model, rate = mlp(seed), 0.5
    before = copy.deepcopy(model)
    sparsity.GroupLasso(model, torch.randn(2, 5).double(), strength=strength, over=("filters",))(
        model, rate
    )
    for row, bias, old_row, old_bias in zip(
        model[0].weight, model[0].bias, before[0].weight, before[0].bias, strict=True
    ):
        old, new = torch.cat([old_row, old_bias[None]]), torch.cat([row, bias[None]])
        least = rate * strength * math.sqrt(6)
        if old.norm() <= least:
            assert (new == 0).all()
        else:
            # The gradient of ½‖g - old‖² + t ‖g‖ is 0 there.
            gradient = new - old + least * new / new.norm()
            assert gradient.norm() < 1e-12
    assert torch.equal(model[2].weight, before[2].weight)


def test_no_strength_changes_nothing_and_a_negative_one_is_refused() -> None:
    model, batch = make("a residual block")
    before = copy.deepcopy(model.state_dict())
    sparsity.GroupLasso(model, batch, strength=0.0, over=KINDS[:3])(model, 1.0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for strength in (-1.0, math.nan):
        with pytest.raises(RankfoldError, match="strength"):
            sparsity.GroupLasso(model, batch, strength=strength)


def test_filters_that_a_norm_follows_shrink_by_its_scale_and_shift() -> None:
    model, batch = make("one after the other")
    with torch.no_grad():
        model.norm.weight[0], model.norm.bias[0] = 1e-3, 1e-3
    weight = model.first.weight.clone()
    lasso = sparsity.GroupLasso(model, batch, strength=1e-2, over=("filters",))
    assert lasso.groups[0].sizes.tolist() == [6 * 9 + 2] * 6
    lasso(model, 0.1)
    assert lasso.zero_groups(model) == {"filters": (1, 6)}
    assert (model.first.weight[0] == 0).all() and torch.equal(model.first.weight[1:], weight[1:])
    assert model.norm.weight[0] == model.norm.bias[0] == model.norm.running_mean[0] == 0
    assert sparsity.remove_zero_groups(model, batch).first.out_channels == 5


def test_zero_groups_stay_zero_in_training() -> None:
    """The gradient of a group behind a ReLU that is 0 is 0, and the step undoes momentum."""
    model = make_model().train()
    data = make_labelled()
    lasso = sparsity.GroupLasso(model, data[0][0], strength=0.04, over=("filters",))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    zero = []
    for images, labels in data * 2:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        lasso(model, 0.05)
        zero.append(lasso.zero_groups(model)["filters"][0])
    assert zero[-1] > zero[0] and zero[-1] > 5
    small = sparsity.remove_zero_groups(model.eval(), data[0][0])
    with torch.no_grad():
        assert output_error(model(data[1][0]), small(data[1][0])) < 1e-5
    kept = sum(one.out_channels for one in (small.stem, small.body)) + small.head.out_features
    assert kept == 32 + 48 + 64 - zero[-1]


@pytest.mark.parametrize(
    "make_form",
    [
        lambda layer: TwoFactorConvolution(layer, 24),
        lambda layer: TuckerConvolution(layer, (24, 16)),
        lambda layer: CPConvolution(layer, 30),
        lambda layer: CPConvolution(layer, 30, separable=True),
    ],
)
def test_rank_one_terms_of_factorized_layers(make_form) -> None:
    small, data = make_model(), make_data()
    form = small.body = make_form(small.body)
    lasso = sparsity.GroupLasso(small, data[0], strength=0.01, over=("ranks",), layers="body*")
    inner = [one.out_channels for one in list(form)[:-1] if one.groups == 1]
    assert lasso.groups[0].count == sum(inner)
    while lasso.zero_groups(small)["ranks"][0] < sum(inner) // 3:
        lasso(small, 0.1)
    fewer = sparsity.remove_zero_groups(small, data[0])
    assert type(fewer.body) is type(form)
    left = [one.out_channels for one in list(fewer.body)[:-1] if one.groups == 1]
    assert sum(left) == sum(inner) - lasso.zero_groups(small)["ranks"][0]
    with torch.no_grad():
        assert output_error(small(data[0]), fewer(data[0])) < 1e-5
        given = torch.randn(1, 32, 8, 8)
        assert output_error(fewer.body(given), fewer.body.to_dense()(given)) < 1e-5


def test_recovery_steps_with_it() -> None:
    model, data = make_model(), make_data()
    lasso = sparsity.GroupLasso(model, data[0], strength=0.3)
    batches = torch.utils.data.DataLoader(torch.cat(data), 8)
    rankfold.recover(
        model, batches, teacher=make_model(), epochs=3, learning_rate=1e-2, after_step=lasso
    )
    zero = lasso.zero_groups(model)
    assert zero["filters"][0] > 0
    small = sparsity.remove_zero_groups(model, data[0])
    with torch.no_grad():
        assert output_error(model(data[0]), small(data[0])) < 1e-5


def test_only_layers_that_match_and_all_that_share_a_channel() -> None:
    model, batch = make("two residual blocks")
    everything = sparsity.GroupLasso(model, batch, over=("filters",))
    assert everything.groups[0].count == 12
    # The stem's channels are made by three layers: they shrink where all three match.
    with pytest.raises(RankfoldError, match="no filters of second can be taken out"):
        sparsity.GroupLasso(model, batch, over=("filters",), layers="second")
    stem = sparsity.GroupLasso(
        model, batch, over=("filters",), layers=["first", "second", "reflected"]
    )
    assert stem.groups[0].count == 6
    inner = sparsity.GroupLasso(model, batch, over=("filters",), layers="third")
    assert [one.name for one in inner.groups[0].measured] == ["third.weight", "third.bias"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("an activation that makes something of nothing", "filters"),
        ("a layer norm", "filters"),
        ("called twice", "channels"),
        ("flattened", "depth"),
        ("linear layers", "shapes"),
        ("one after the other", "ranks"),
    ],
)
def test_groups_that_could_not_leave_are_none(name, kind) -> None:
    model, batch = make(name)
    with pytest.raises(RankfoldError, match=f"no {kind} of"):
        sparsity.GroupLasso(model, batch, over=(kind,))


def test_kinds_that_there_are_not_and_models_that_do_not_run_are_refused() -> None:
    model, batch = make("flattened")
    with pytest.raises(RankfoldError, match="no groups 'rows'; there are shapes"):
        sparsity.GroupLasso(model, batch, over=("rows",))
    with pytest.raises(ModelError, match="fails on batch 0"):
        sparsity.GroupLasso(model, batch[:, 1:])


def test_shapes_and_depth_are_those_of_the_paper() -> None:
    model, batch = make("a residual block")
    lasso = sparsity.GroupLasso(model, batch, over=("shapes", "depth"), layers="*")
    shapes, depth = lasso.groups
    # Of each of the four convolutions a column of the unfolded weight is a group.
    assert shapes.count == 4 * 6 * 9
    assert set(shapes.sizes.tolist()) == {6, 5}
    assert [one.name for one in depth.measured] == ["other.weight", "other.bias"]
    assert {one.name for one in depth.cleared} == {
        "other.running_mean",
        "second.weight",
        "second.bias",
    }
    branch = (model.first, model.norm, model.second, model.other)
    owned = sum(own.numel() for one in branch for own in one.parameters())
    assert depth.sizes.tolist() == [owned]
