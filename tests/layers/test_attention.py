"""Attention of linear layers computes what torch's own does."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rankfold.layers import TwoFactorLinear, UnfusedAttention


@st.composite
def attentions(draw):
    """An `nn.MultiheadAttention` of any kind, and inputs for it, batched or not."""
    heads = draw(st.sampled_from([1, 2, 3]))
    width = heads * draw(st.integers(1, 5))
    other = draw(st.booleans())
    seed = draw(st.integers(0, 100))
    torch.manual_seed(seed)
    attention = nn.MultiheadAttention(
        width,
        heads,
        bias=draw(st.booleans()),
        add_bias_kv=draw(st.booleans()),
        add_zero_attn=draw(st.booleans()),
        kdim=draw(st.integers(1, 9)) if other else None,
        vdim=draw(st.integers(1, 9)) if other else None,
        batch_first=draw(st.booleans()),
        dtype=torch.float64,
    )
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    batch, queries, keys = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    batched = draw(st.booleans())

    def tensor(positions: int, features: int) -> torch.Tensor:
        made = torch.randn(batch, positions, features, dtype=torch.float64)
        if not batched:
            return made[0]
        return made if attention.batch_first else made.transpose(0, 1)

    inputs = (tensor(queries, width), tensor(keys, attention.kdim), tensor(keys, attention.vdim))
    boolean = draw(st.booleans())

    def mask(*shape: int) -> torch.Tensor:
        hidden = torch.rand(shape) < 0.5
        hidden[..., 0] = False  # of nothing to see the weights are NaN in torch too
        if boolean:
            return hidden
        return torch.randn(shape, dtype=torch.float64).masked_fill(hidden, -torch.inf)

    masks = {}
    if draw(st.booleans()):
        masks["key_padding_mask"] = mask(*((batch, keys) if batched else (keys,)))
    kind = draw(st.sampled_from(["none", "all", "each"]))
    if kind == "all":
        masks["attn_mask"] = mask(queries, keys)
    elif kind == "each":
        masks["attn_mask"] = mask((batch if batched else 1) * heads, queries, keys)
    return attention, inputs, masks


@given(attentions(), st.booleans(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_it_computes_what_torch_does(case, need_weights: bool, average: bool) -> None:
    attention, inputs, masks = case
    asked = {"need_weights": need_weights, "average_attn_weights": average, **masks}
    for mode in (attention.eval(), attention.train()):
        ours, weights = UnfusedAttention(mode)(*inputs, **asked)
        theirs, expected = mode(*inputs, **asked)
        torch.testing.assert_close(ours, theirs)
        assert (weights is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(weights, expected)


@given(attentions())
@settings(max_examples=50, deadline=None)
def test_the_dense_attention_comes_back(case) -> None:
    attention, _, _ = case
    attention.dropout = 0.25
    dense = UnfusedAttention(attention.eval()).to_dense()
    assert repr(dense) == repr(attention) and not dense.training
    for name in ("num_heads", "dropout", "batch_first", "add_zero_attn", "kdim", "vdim"):
        assert getattr(dense, name) == getattr(attention, name)
    for name, value in attention.state_dict().items():
        torch.testing.assert_close(dense.state_dict()[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_the_hint_that_a_mask_is_causal(need_weights: bool, padded: bool) -> None:
    attention = nn.MultiheadAttention(12, 3, batch_first=True, add_bias_kv=True)
    tensor = torch.randn(2, 5, 12)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    padding = torch.zeros(2, 5).masked_fill(torch.arange(5) > 2, -torch.inf) if padded else None
    asked = {"need_weights": need_weights, "attn_mask": mask, "key_padding_mask": padding}
    opened = UnfusedAttention(attention)
    for hint in (True, False):
        ours, _ = opened(tensor, tensor, tensor, is_causal=hint, **asked)
        theirs, _ = attention(tensor, tensor, tensor, is_causal=hint, **asked)
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(RuntimeError, match="attn_mask"):
        opened(tensor, tensor, tensor, is_causal=True)


def test_masks_of_whole_numbers_are_refused() -> None:
    opened, tensor = UnfusedAttention(nn.MultiheadAttention(4, 2)), torch.randn(3, 1, 4)
    with pytest.raises(TypeError, match="int64"):
        opened(tensor, tensor, tensor, attn_mask=torch.zeros(3, 3, dtype=torch.int64))


def test_dropout_is_of_training_alone() -> None:
    attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
    tensor = torch.randn(2, 6, 8)
    opened = UnfusedAttention(attention)
    for need_weights in (True, False):
        found = []
        for module in (opened, attention):
            torch.manual_seed(3)
            found.append(module(tensor, tensor, tensor, need_weights=need_weights)[0])
        plain = opened.eval()(tensor, tensor, tensor, need_weights=need_weights)[0]
        torch.testing.assert_close(attention.eval()(tensor, tensor, tensor)[0], plain)
        if need_weights:  # fused kernels drop what they will
            torch.testing.assert_close(*found)
        assert not torch.allclose(found[0], plain)
        attention.train(), opened.train()


def test_parameters_are_copies_of_the_same_kind() -> None:
    attention = nn.MultiheadAttention(8, 2, add_bias_kv=True, dtype=torch.float64).eval()
    attention.in_proj_weight.requires_grad_(False)
    opened = UnfusedAttention(attention)
    assert not opened.training
    assert [p.requires_grad for p in opened.q_proj.parameters()] == [False, True]
    assert {p.dtype for p in opened.parameters()} == {torch.float64}
    storages = {p.untyped_storage().data_ptr() for p in opened.parameters()}
    assert len(storages) == len(list(opened.parameters()))
    assert not storages & {p.untyped_storage().data_ptr() for p in attention.parameters()}
    numbers = [sum(p.numel() for p in module.parameters()) for module in (attention, opened)]
    assert numbers[0] == numbers[1]


def test_packed_parameters_can_be_asked_for_of_factors_too() -> None:
    attention = nn.MultiheadAttention(8, 2)
    opened = UnfusedAttention(attention)
    torch.testing.assert_close(opened.in_proj_weight, attention.in_proj_weight)
    torch.testing.assert_close(opened.in_proj_bias, attention.in_proj_bias)
    opened.k_proj = TwoFactorLinear(opened.k_proj, 3)
    expected = opened.k_proj[1].weight @ opened.k_proj[0].weight
    torch.testing.assert_close(opened.in_proj_weight[8:16], expected)
    torch.testing.assert_close(opened.to_dense().in_proj_weight[8:16], expected)
    assert UnfusedAttention(nn.MultiheadAttention(8, 2, bias=False)).in_proj_bias is None
    assert UnfusedAttention(nn.MultiheadAttention(8, 2, kdim=3)).in_proj_weight is None


def test_heads_may_be_narrower() -> None:
    """Of queries and keys whose last features of a head are zero, those are not needed."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    opened = UnfusedAttention(attention)
    narrow = copy.deepcopy(opened)
    kept = torch.tensor([0, 1, 2, 4, 5, 6])
    with torch.no_grad():
        for name in ("q_proj", "k_proj"):
            wide, smaller = getattr(opened, name), nn.Linear(8, 6)
            smaller.weight.copy_(wide.weight[kept])
            smaller.bias.copy_(wide.bias[kept])
            setattr(narrow, name, smaller)
            for parameter in (wide.weight, wide.bias):
                parameter[[3, 7]] = 0
    tensor = torch.randn(2, 5, 8)
    for need_weights in (True, False):
        ours, theirs = (
            module(tensor, tensor, tensor, need_weights=need_weights)[0]
            for module in (narrow, opened)
        )
        torch.testing.assert_close(ours, theirs)
