"""Models of transformers, as directories and as modules. Skipped where it is not installed."""

import copy
import json
import sys

import pytest
import torch
from torch import nn

import rankfold
from rankfold.cli import app
from rankfold.cost import count_parameters
from rankfold.errors import CalibrationError, CheckpointError, ModelError
from rankfold.imports import resolve_model, resolve_text
from rankfold.layers import TwoFactorEmbedding, TwoFactorLinear
from rankfold.methods import LowRank, reduction
from rankfold.pretrained import (
    _tokenizer_files,
    build_pretrained,
    load_pretrained,
    text_batches,
)

transformers = pytest.importorskip("transformers")

WORDS = [f"w{number}" for number in range(60)]
TEXT = "\n".join(" ".join(WORDS[(7 * i + j * j) % 60] for j in range(40)) for i in range(40))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_layer=2,
        n_embd=32,
        n_head=4,
        vocab_size=64,
        n_positions=48,
        bos_token_id=1,
        eos_token_id=1,
    )
    return made(transformers.GPT2LMHeadModel, config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=48,
        bos_token_id=1,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    return made(transformers.LlamaForCausalLM, config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=64,
        max_position_embeddings=48,
    )
    return made(transformers.BertForMaskedLM, config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        d_model=32, d_ff=64, num_layers=1, num_heads=4, d_kv=8, vocab_size=64
    )
    return made(transformers.T5ForConditionalGeneration, config)


def made(kind, config) -> nn.Module:
    torch.manual_seed(0)
    model = kind(config).eval()
    for parameter in model.parameters():  # far enough from nothing for tokens to differ
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.3)
    return model


def ids(count: int = 4, length: int = 12) -> torch.Tensor:
    return torch.randint(2, 64, (count, length), generator=torch.Generator().manual_seed(2))


def batches() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": part} for part in ids(20).split(4)]


def tokenizer(padded: bool):
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["[PAD]", "[END]", "[UNK]", *WORDS]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]"} if padded else {}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", eos_token="[END]", **special
    )


def directory(path, model, padded: bool = False):
    model.save_pretrained(path)
    tokenizer(padded).save_pretrained(path)
    return path


def at_full_rank(model: nn.Module) -> nn.Module:
    """Every layer that svd takes at full rank, without an analysis: no plan would do that."""
    small, method = copy.deepcopy(model), LowRank(alignment=1)
    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
    for name, layer in list(small.named_modules()):
        if isinstance(layer, kinds) and "lm_head" not in name:
            family = reduction.fit(method, layer, rankfold.methods.WEIGHT_METRIC)
            form = family.build((min(layer.weight.shape),))
            small.set_submodule(name, form)
    return small


def generated(model: nn.Module, use_cache: bool) -> torch.Tensor:
    prompt = ids(3, 5)
    return model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=12,
        do_sample=False,
        use_cache=use_cache,
        pad_token_id=0,
    )


@pytest.mark.parametrize("make", [gpt2, llama], ids=lambda make: make.__name__)
def test_generation_with_and_without_the_cache(make) -> None:
    model = make()
    analysis = rankfold.analyze(model, batches(), metric="response", check=False)
    small = rankfold.factorize(model, analysis.plan(params=0.7))
    assert torch.equal(generated(small, True), generated(small, False))
    full = at_full_rank(model)
    assert sum(isinstance(module, TwoFactorLinear) for module in full.modules()) >= 8
    for use_cache in (True, False):
        assert torch.equal(generated(full, use_cache), generated(model, use_cache))


def test_every_kind_of_layer_of_gpt2_and_bert() -> None:
    for make, tied in ((gpt2, "lm_head"), (bert, "cls.predictions.decoder")):
        analysis = rankfold.analyze(make(), batches(), metric="weight", methods="svd")
        layers = {layer.name: layer for layer in analysis.layers}
        (shared,) = (layer for layer in layers.values() if layer.tied)
        assert shared.tied == (tied,) and layers[tied].reason.startswith("it shares the weight of")
        able = [layer for layer in layers.values() if layer.reason is None]
        assert len(layers) - len(able) <= 2, {n: one.reason for n, one in layers.items()}


def test_an_embedding_that_three_modules_and_the_output_share() -> None:
    model = t5()
    data = [{**batch, "decoder_input_ids": batch["input_ids"][:, :5]} for batch in batches()]
    analysis = rankfold.analyze(model, data, metric="fisher", check=False)
    plan = analysis.plan(params=0.9, overrides=rankfold.Overrides(force={"shared": "svd"}))
    (entry,) = (entry for entry in plan.factorized if entry.tied)
    modules = dict(model.named_modules())  # in some releases all three are one
    embeddings = {"encoder.embed_tokens", "decoder.embed_tokens"} & modules.keys()
    assert entry.name == "shared" and set(entry.tied) == {*embeddings, "lm_head"}
    small = rankfold.factorize(model, plan)
    assert count_parameters(small) == plan.after.parameters
    tables = {id(one[0].weight) for one in small.modules() if isinstance(one, TwoFactorEmbedding)}
    assert tables == {id(small.lm_head[1].weight)}
    assert isinstance(small.encoder.embed_tokens, TwoFactorEmbedding)
    assert isinstance(small.decoder.embed_tokens, TwoFactorEmbedding)
    small(**data[0])
    # Its weight is asked for its dtype past the layer's forward.
    reasons = {layer.name: layer.reason for layer in analysis.layers}
    assert "reads its weight" in reasons["encoder.block.0.layer.1.DenseReluDense.wo"]


@pytest.mark.parametrize("make", [gpt2, llama, bert], ids=lambda make: make.__name__)
def test_from_directory_to_directory(tmp_path, make) -> None:
    source = directory(tmp_path / "dense", make(), padded=make is bert)
    model = resolve_model(str(source))
    (tmp_path / "text.txt").write_text(TEXT)
    data = resolve_text(str(tmp_path / "text.txt"), str(source))
    small = rankfold.compress(
        model, data, params=0.8, loss_metric="response", epochs=1, methods="svd"
    )
    rankfold.save(small, tmp_path / "small")
    names = {file.name for file in (tmp_path / "small").iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "plan.json"} <= names
    loaded = rankfold.load(tmp_path / "small")
    assert type(loaded) is type(model) and not loaded.training
    with torch.no_grad():
        outputs = [network(**data[0]).logits for network in (small, loaded)]
    assert torch.equal(*outputs)
    assert count_parameters(loaded) == count_parameters(small)
    with pytest.raises(ModelError, match=r"lack '.*it is of a factorized model"):
        load_pretrained(tmp_path / "small")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "small")
    assert again("w1 w2")["input_ids"] == tokenizer(False)("w1 w2")["input_ids"]
    rankfold.save(loaded, tmp_path / "small", force=True)
    assert torch.equal(rankfold.load(tmp_path / "small")(**data[0]).logits, outputs[0])
    if make is not bert:
        assert (tmp_path / "small" / "generation_config.json").is_file()
        assert torch.equal(generated(loaded, True), generated(small, True))


def test_without_architectures_it_is_the_model_without_a_head(tmp_path) -> None:
    gpt2().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert type(load_pretrained(tmp_path)) is transformers.GPT2Model


def test_half_precision_stays(tmp_path) -> None:
    source = directory(tmp_path / "dense", llama().to(torch.bfloat16))
    for model in (load_pretrained(source), build_pretrained(source)):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32


def test_on_the_command_line(tmp_path, capsys) -> None:
    source = directory(tmp_path / "dense", gpt2())
    (tmp_path / "text.txt").write_text(TEXT)
    common = ["--text", str(tmp_path / "text.txt"), "--params", "0.8", "--loss-metric", "response"]
    out = str(tmp_path / "small")
    for command in (
        ["compress", str(source), *common, "--out", out, "--epochs", "1", "--json"],
        ["evaluate", out, "--json"],
    ):
        app(command, standalone_mode=False)
        found = json.loads(capsys.readouterr().out)
        assert found["after"]["parameters"] < 0.81 * found["before"]["parameters"]
    with pytest.raises(CalibrationError, match="--text"):
        app(["inspect", str(source)], standalone_mode=False)


def test_batches_of_text(tmp_path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    blocks = text_batches(
        directory(tmp_path / "one", gpt2()), tmp_path / "text.txt", length=100, size=3
    )
    # 1600 words in blocks as long as the model has positions.
    assert [tuple(block["input_ids"].shape) for block in blocks] == [(3, 48)] * 11
    lines = text_batches(
        directory(tmp_path / "two", bert(), padded=True), tmp_path / "text.txt", length=10
    )
    assert len(lines) == 5 and lines[0]["attention_mask"].shape == (8, 10)
    (tmp_path / "short.txt").write_text("w1 w2\n")
    for name in ("short.txt", "missing.txt"):
        with pytest.raises(CalibrationError, match=name):
            text_batches(tmp_path / "one", tmp_path / name)
    gpt2().save_pretrained(tmp_path / "bare")
    with pytest.raises(CalibrationError, match="no tokenizer"):
        text_batches(tmp_path / "bare", tmp_path / "text.txt")


def test_directories_that_hold_no_model(tmp_path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        resolve_model(str(tmp_path))
    for config, message in (
        ("{", r"config\.json"),
        ('{"model_type": "gpt2", "architectures": ["NoSuchModel"]}', "NoSuchModel"),
        ('{"model_type": "gpt2", "architectures": ["AutoTokenizer"]}', "AutoTokenizer"),
        ('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}', str(tmp_path)),
    ):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(ModelError, match=message):
            load_pretrained(tmp_path)
    with pytest.raises(CalibrationError, match="directory"):
        resolve_text("text.txt", "networks:make_model")


def test_a_saved_network_that_names_no_other_needs_like(tmp_path) -> None:
    model = nn.Sequential(nn.Linear(32, 32)).eval()
    plan = rankfold.analyze(model, [torch.randn(4, 32)], metric="weight").plan(fraction=0.25)
    rankfold.save(rankfold.factorize(model, plan), tmp_path / "small")
    with pytest.raises(CheckpointError, match="like="):
        rankfold.load(tmp_path / "small")


def test_adapters_of_peft_go_onto_factors() -> None:
    peft = pytest.importorskip("peft")
    model, data = bert(), batches()
    plan = rankfold.analyze(model, data, metric="weight").plan(params=0.8)
    small = rankfold.factorize(model, plan)
    factors = [
        f"{entry.name}.{place}" for entry in plan.factorized for place in (0, 1) if not entry.tied
    ]
    factors = [name for name in factors if isinstance(small.get_submodule(name), nn.Linear)]
    with torch.no_grad():
        expected = small(**data[0])[0]
    adapted = peft.get_peft_model(small, peft.LoraConfig(r=2, target_modules=factors))
    with torch.no_grad():
        torch.testing.assert_close(adapted(**data[0])[0], expected)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * len(factors) > 0 and all("lora" in name for name in trained)
    adapted(**data[0])[0].square().mean().backward()
    optimizer = torch.optim.SGD((p for p in adapted.parameters() if p.requires_grad), 1.0)
    optimizer.step()
    with torch.no_grad():
        tuned = adapted.eval()(**data[0])[0]
        assert not torch.allclose(tuned, expected)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(**data[0])[0], tuned, rtol=1e-4, atol=1e-5)


def test_links_out_of_a_directory_are_not_copied(tmp_path) -> None:
    """A tokenizer file may be a link to something of the user's, in a directory from a stranger."""
    secret = tmp_path / "secret.txt"
    secret.write_text("mine")
    source = directory(tmp_path / "dense", gpt2())
    (source / "vocab.txt").symlink_to(secret)
    (source / "merges.txt").symlink_to("config.json")
    model = load_pretrained(source)
    plan = rankfold.analyze(model, [{"input_ids": torch.arange(8)[None]}], metric="weight")
    rankfold.save(rankfold.factorize(model, plan.plan(params=0.9)), tmp_path / "small")
    names = {path.name for path in (tmp_path / "small").iterdir()}
    assert "vocab.txt" not in names and {"merges.txt", "tokenizer.json"} <= names
    # A hub's cache is all links, to files beside.
    snapshot = tmp_path / "models--x" / "snapshots" / "1"
    blobs = tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/abc")
    (snapshot / "vocab.txt").symlink_to(secret)
    assert [file.name for file in _tokenizer_files(snapshot)] == ["tokenizer.json"]


def test_without_transformers_the_extra_is_named(tmp_path, monkeypatch) -> None:
    gpt2().save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelError, match=r"pip install 'rankfold\[hf\]'"):
        load_pretrained(tmp_path)


def test_loading_draws_no_bar_and_leaves_the_setting(tmp_path, capsys) -> None:
    gpt2().save_pretrained(tmp_path)
    capsys.readouterr()
    load_pretrained(tmp_path)
    assert capsys.readouterr().err == ""
    assert transformers.utils.logging.is_progress_bar_enabled()
