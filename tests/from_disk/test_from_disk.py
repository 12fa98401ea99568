"""Models compressed from disk to disk, beside the same done in memory."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import rankfold
from rankfold.analysis import Overrides
from rankfold.cli.app import app
from rankfold.errors import (
    BudgetError,
    CalibrationError,
    CheckpointError,
    JournalError,
    ModelError,
)
from rankfold.fingerprint import weights_sha256
from rankfold.from_disk import compress_from_disk
from rankfold.from_disk.metric import InputsMetric
from rankfold.from_disk.resident import FiledNetwork
from rankfold.methods import LowRank, Moments, reduction
from rankfold.shards import SINGLE, Shards


class Network(nn.Module):
    """Every case: an embedding, linear layers, a tied output, a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.second = (
            nn.Embedding(64, 48),
            nn.Linear(48, 64),
            nn.Linear(64, 48),
        )
        self.norm, self.again = nn.LayerNorm(48), nn.Linear(48, 48)
        self.never, self.kernel = nn.Linear(48, 48), nn.Conv1d(48, 48, 1)
        self.out = nn.Linear(48, 64, bias=False)
        self.out.weight = self.table.weight
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("kept", torch.arange(3.0), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.table(ids) * self.scale
        hidden = self.norm(hidden + self.second(self.first(hidden).relu()))
        hidden = self.again(self.again(hidden))
        return self.out(hidden + self.kernel(hidden.mT).mT)


def make_network() -> nn.Module:
    torch.manual_seed(0)
    model = Network().eval()
    model.scale.fill_(2.0)
    return model


def directory(place, model: nn.Module):
    place.mkdir()
    state = {name: value for name, value in model.state_dict().items() if name != "out.weight"}
    save_file(state, place / SINGLE)
    return place


def ids(count: int = 6) -> torch.Tensor:
    return torch.randint(0, 64, (count, 10), generator=torch.Generator().manual_seed(1))


def test_by_weight_alone(tmp_path) -> None:
    model = make_network()
    source = directory(tmp_path / "dense", model)
    plan = compress_from_disk(
        source, tmp_path / "small", like=Network, params=0.8, shard_bytes=9000
    )
    methods = {entry.name: entry.method for entry in plan.layers}
    reasons = {entry.name: entry.reason or "" for entry in plan.layers}
    assert methods["first"] == "svd" and plan.metric == "weight"
    assert "shared" in reasons["table"] and "shared" in reasons["out"]
    assert "Conv1d" in reasons["kernel"]
    small = rankfold.load(tmp_path / "small", Network)
    assert rankfold.record_of(small).source_sha256 == weights_sha256(model)
    assert sum(one.numel() for one in small.parameters()) == plan.after.parameters
    assert small.scale.item() == 2 and torch.equal(small.table.weight, model.table.weight)
    assert small.out.weight is small.table.weight
    # As in memory.
    expected = rankfold.factorize(model, plan)
    assert torch.equal(small(ids()), expected(ids()))
    assert len(list((tmp_path / "small").glob("model-*"))) > 3
    assert not list(tmp_path.glob(".*"))


def test_in_the_metric_of_the_inputs(tmp_path) -> None:
    model = make_network()
    source = directory(tmp_path / "dense", model)
    data = list(ids(8).split(2))
    options = {"like": Network, "data": data, "overrides": Overrides(force={"second": "svd"})}
    with pytest.raises(BudgetError):  # with all layers done, and what is known of them kept
        compress_from_disk(source, tmp_path / "small", macs=0.01, **options)
    plan = compress_from_disk(source, tmp_path / "small", macs=0.8, **options)
    reasons = {entry.name: entry.reason or "" for entry in plan.layers}
    assert "called 2 times" in reasons["again"] and "never calls" in reasons["never"]
    assert plan.metric == "svd-llm" and plan.before.macs == 10 * (2 * 48 * 64)
    small = rankfold.load(tmp_path / "small", Network)
    given: list[torch.Tensor] = []
    model.second.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].detach()))
    model(ids(8))
    (entry,) = (entry for entry in plan.factorized if entry.name == "second")
    rows = given[0].flatten(0, 1).double()
    moments = Moments(rows.mT @ rows / len(rows)).damped(1e-6)
    family = reduction.fit(LowRank(), make_network().second, moments)
    expected = family.build(entry.rank).to_dense().weight
    torch.testing.assert_close(small.second.to_dense().weight, expected, rtol=1e-4, atol=1e-5)
    assert entry.loss == pytest.approx(family.loss(entry.rank))


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch) -> None:
    model = make_network()
    source = directory(tmp_path / "dense", model)
    data = list(ids(8).split(2))

    def run(target, budget, **options):
        return compress_from_disk(
            source, tmp_path / target, like=Network, params=budget, data=data, **options
        )

    whole = run("whole", 0.8, shard_bytes=9000)
    made = []

    def stopping(after):
        factors = InputsMetric.factors

        def stopped(*given):
            if len(made) >= after:
                raise KeyboardInterrupt
            made.append(given[1])
            return factors(*given)

        return stopped

    from rankfold.from_disk import from_disk

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(InputsMetric, "factors", stopping(1))
        run("small", 0.8)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob(".small*/factors/*.entry")}
    assert len(kept) == 1
    written = []
    write_shard = from_disk.write_shard

    def stopped_writing(tensors, path):
        if len(written) == 3:
            raise OSError("the disk is full")
        written.append(path)
        write_shard(tensors, path)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(from_disk, "write_shard", stopped_writing)
        run("small", 0.8, shard_bytes=9000)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    with monkeypatch.context() as patch:
        patch.setattr(
            from_disk, "write_shard", lambda t, path: made.append(path) or write_shard(t, path)
        )
        assert run("small", 0.8, shard_bytes=9000) == whole
    assert not set(written) & set(made)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "small" / path.name).read_bytes(), path.name
    with pytest.raises(BudgetError):  # out of reach: what is finished stays
        run("other", 0.01)
    with pytest.raises(JournalError, match="the journal of other work"):
        compress_from_disk(source, tmp_path / "other", like=Network, params=0.8)


def test_wrong_sources_and_targets(tmp_path) -> None:
    source = directory(tmp_path / "dense", make_network())
    with pytest.raises(ModelError, match=r"no config\.json"):
        compress_from_disk(source, tmp_path / "small", params=0.8)
    with pytest.raises(CalibrationError, match="joined"):
        wrong = [ids(2), ids(2)[:, :4]]
        compress_from_disk(source, tmp_path / "small", like=Network, params=0.8, data=wrong)

    class Wider(Network):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(48, 65)

    with pytest.raises(ModelError, match=r"'first.weight' has shape \(64, 48\)"):
        FiledNetwork(source, Wider)
    with pytest.raises(ModelError, match=r"lack 'more\.weight'"):
        FiledNetwork(source, lambda: nn.ModuleDict({"more": nn.Linear(2, 2)}))
    compress_from_disk(source, tmp_path / "small", like=Network, params=0.8)
    with pytest.raises(CheckpointError, match="exists"):
        compress_from_disk(source, tmp_path / "small", like=Network, params=0.7)
    plan = compress_from_disk(source, tmp_path / "small", like=Network, params=0.7, force=True)
    assert rankfold.record_of(rankfold.load(tmp_path / "small", Network)).plan == plan.bare()


def test_a_shard_that_is_damaged_is_not_loaded(tmp_path) -> None:
    source = directory(tmp_path / "dense", make_network())
    place = tmp_path / "small"
    compress_from_disk(source, place, like=Network, params=0.8, shard_bytes=9000)
    shard = Shards.of(place).files[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="SHA-256"):
        rankfold.load(place, Network)
    shard.unlink()
    with pytest.raises(CheckpointError, match="has no model-00002"):
        rankfold.load(place, Network)
    shard.write_bytes(whole)
    document = json.loads((place / "plan.json").read_text())
    for shards in ({"../x.safetensors": "0"}, [], {shard.name: 3}):
        (place / "plan.json").write_text(json.dumps({**document, "shards": shards}))
        with pytest.raises(CheckpointError, match="'shards' is"):
            rankfold.load(place, Network)
    (place / "plan.json").write_text(
        json.dumps({**document, "shards": dict(list(document["shards"].items())[1:])})
    )
    with pytest.raises(CheckpointError, match="knows not"):
        rankfold.load(place, Network)


def test_of_transformers(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        dtype="bfloat16",
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).bfloat16().eval()
    model.save_pretrained(tmp_path / "dense", max_shard_size="40KB")
    assert len(Shards.of(tmp_path / "dense").files) > 2
    data = [{"input_ids": part} for part in ids(8).split(2)]
    plan = compress_from_disk(tmp_path / "dense", tmp_path / "small", params=0.8, data=data)
    assert len(plan.factorized) > 4
    small = rankfold.load(tmp_path / "small")
    assert small.dtype == torch.bfloat16 and small.lm_head.weight is small.model.embed_tokens.weight
    with torch.no_grad():
        ours, theirs = small(**data[0]).logits.float(), model(**data[0]).logits.float()
    assert ((ours - theirs).norm() / theirs.norm()).item() < 0.5
    made = small.generate(input_ids=ids(1), max_new_tokens=4, do_sample=False)
    assert made.shape == (1, 14)
    saved = copy.deepcopy(small)
    rankfold.save(saved, tmp_path / "again")
    again = rankfold.load(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(**data[0]).logits, small(**data[0]).logits)
    tensors = load_file(tmp_path / "again" / SINGLE)
    assert tensors.keys() == Shards.of(tmp_path / "small").file_of.keys()
    # The same on the command line.
    command = ["from-disk", str(tmp_path / "dense"), "--params", "0.8", "--json"]
    done = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "told")])
    told = json.loads(done.stdout)["plan"]["layers"]
    assert done.exit_code == 0 and sum(layer["method"] is not None for layer in told) > 4
    rankfold.load(tmp_path / "told")(**data[0])
