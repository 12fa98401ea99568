import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import rankfold
from rankfold.layers import TwoFactorLinear, UnfusedAttention
from rankfold.unfusing import leave_fast_paths, unfuse, unfused

pytestmark = pytest.mark.filterwarnings(
    "ignore:enable_nested_tensor", "ignore:The PyTorch API of nested"
)


def encoder(**settings) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, **settings)
    return nn.TransformerEncoder(layer, 2).eval()


def kinds(model: nn.Module) -> list[type]:
    wanted = (nn.MultiheadAttention, UnfusedAttention)
    return [type(module) for module in model.modules() if isinstance(module, wanted)]


def test_within_it_is_another_model_that_does_the_same() -> None:
    model, data = encoder(), torch.randn(2, 5, 32)
    before = model(data)
    with pytest.raises(KeyError), unfused(model) as opened:
        assert opened is model and kinds(model) == [UnfusedAttention] * 2
        assert not torch.backends.mha.get_fastpath_enabled()
        torch.testing.assert_close(model(data), before)
        raise KeyError
    assert kinds(model) == [nn.MultiheadAttention] * 2
    assert torch.backends.mha.get_fastpath_enabled()
    alone = nn.MultiheadAttention(8, 2)
    with unfused(alone) as opened:
        assert isinstance(opened, UnfusedAttention)


def test_attention_that_stays_as_it_is() -> None:
    class Own(nn.MultiheadAttention):
        pass

    hooked, tied, other = (nn.MultiheadAttention(8, 2) for _ in range(3))
    hooked.out_proj.register_forward_hook(lambda *_: None)
    other.in_proj_weight = tied.in_proj_weight
    normed = parametrizations.weight_norm(nn.MultiheadAttention(8, 2), "in_proj_weight")
    plain = nn.MultiheadAttention(8, 2)
    model = nn.ModuleList([Own(8, 2), hooked, tied, other, normed, plain])
    with unfused(model):
        assert [isinstance(module, UnfusedAttention) for module in model] == [False] * 5 + [True]


def test_only_those_of_which_a_projection_is_named() -> None:
    model = encoder()
    model.again = model.layers[1].self_attn  # a second place of the same module
    unfuse(model, ["layers.1.self_attn.v_proj", "layers.0.linear1", "layers.0.self_attn.nothing"])
    assert kinds(model) == [nn.MultiheadAttention, UnfusedAttention]
    assert model.again is model.layers[1].self_attn


@pytest.mark.parametrize("part", ["linear1", "linear2", "self_attn.k_proj"])
def test_fast_paths_are_left_for_layers_that_are_replaced(part: str) -> None:
    """They read `linear1.weight` and its like, in eval mode alone."""
    model, data = encoder(), torch.randn(3, 5, 32)
    expected = model(data)
    unfuse(model, [f"layers.1.{part}"])
    layer = model.get_submodule(f"layers.1.{part}")
    full = TwoFactorLinear(layer, min(layer.weight.shape))
    with torch.no_grad():
        u, s, v = torch.linalg.svd(layer.weight, full_matrices=False)
        full[0].weight.copy_(v), full[1].weight.copy_(u * s), full[1].bias.copy_(layer.bias)
    parent, _, child = f"layers.1.{part}".rpartition(".")
    setattr(model.get_submodule(parent), child, full)
    leave_fast_paths(model)
    padding = torch.arange(5) > torch.tensor([[4], [2], [3]])
    with torch.no_grad():
        torch.testing.assert_close(model(data), expected)
        padded = model(data, src_key_padding_mask=padding)
    torch.testing.assert_close(
        padded[~padding], encoder()(data, src_key_padding_mask=padding)[~padding]
    )
    model.train()(data).sum().backward()


def test_fast_paths_of_what_is_not_replaced_stay() -> None:
    model = encoder()
    leave_fast_paths(model)
    assert model.use_nested_tensor and model.layers[0].activation_relu_or_gelu == 1


@pytest.mark.parametrize("norm_first", [True, False])
def test_transformers_of_torch_end_to_end(tmp_path, norm_first: bool) -> None:
    model = encoder(norm_first=norm_first)
    data = list(torch.randn(8, 4, 6, 32))
    analysis = rankfold.analyze(model, data, metric="response", check=False)
    names = {layer.name for layer in analysis.layers if layer.reason is None}
    parts = [f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")] + ["linear1", "linear2"]
    assert names == {f"layers.{i}.{part}" for i in range(2) for part in parts}
    assert kinds(model) == [nn.MultiheadAttention] * 2
    plan = analysis.plan(params=0.6)
    small = rankfold.factorize(model, plan)
    assert sum(p.numel() for p in small.parameters()) == plan.after.parameters
    rankfold.recover(small, data, teacher=model, epochs=1)
    rankfold.save(small, tmp_path / "small")
    loaded = rankfold.load(tmp_path / "small", encoder(norm_first=norm_first))
    padding = torch.arange(6).expand(4, 6) > 3
    with torch.no_grad():
        ours, theirs = (
            network(data[0], src_key_padding_mask=padding) for network in (small.eval(), loaded)
        )
    assert torch.equal(ours, theirs)
    refitted = rankfold.refit(loaded, model, data, [entry.name for entry in plan.factorized])
    assert refitted.gain >= 1


def test_a_whole_transformer_with_cross_attention() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(24, 2, 1, 1, 48, batch_first=True).eval()
    data = [(tuple(torch.randn(2, 3, 5, 24).unbind()), None) for _ in range(4)]
    analysis = rankfold.analyze(model, data, metric="weight", methods="svd")
    attentions = {layer.name.rpartition(".")[0] for layer in analysis.layers if layer.candidates}
    assert "decoder.layers.0.multihead_attn" in attentions
    small = rankfold.factorize(model, analysis.plan(fraction=1 / 3))
    assert UnfusedAttention in kinds(small)
    small(*data[0][0])
