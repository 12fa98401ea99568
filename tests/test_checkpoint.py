import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from networks import fail, make_data, make_model, not_a_model
from safetensors.torch import load_file, save_file
from torch import nn

import rankfold
from rankfold import checkpoint
from rankfold.errors import CheckpointError, ModelError, PlanError


def factorized(model: nn.Module | None = None, batch: object = None, **budget: float) -> nn.Module:
    model = make_model() if model is None else model
    batch = make_data()[0] if batch is None else batch
    plan = rankfold.analyze(model, [batch]).plan(**(budget or {"fraction": 0.2}))
    return rankfold.factorize(model, plan)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    rankfold.save(factorized(), tmp_path / "small")
    return tmp_path / "small"


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_loaded_in_a_fresh_process_it_gives_the_same_bits(tmp_path: Path, memory_format) -> None:
    small = factorized().to(memory_format=memory_format)
    rankfold.save(small, tmp_path / "small")
    with torch.no_grad():
        save_file({"output": small(make_data()[0])}, tmp_path / "expected.safetensors")
    program = """
import sys, torch, rankfold
from networks import make_data, SmallConvolutional
from safetensors.torch import load_file
torch.set_num_threads(int(sys.argv[2]))
small = rankfold.load(sys.argv[1] + "/small", SmallConvolutional)
expected = load_file(sys.argv[1] + "/expected.safetensors")["output"]
with torch.no_grad():
    assert torch.equal(small(make_data()[0]), expected)
print(small.body[1].weight.stride())
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), str(torch.get_num_threads())],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(small.body[1].weight.stride())


def test_plan_json_says_what_was_done(saved: Path) -> None:
    document = json.loads((saved / "plan.json").read_text())
    assert document["rankfold"] == rankfold.__version__ and document["torch"] == torch.__version__
    assert {entry["name"] for entry in document["plan"]["layers"] if entry["method"]} == {
        "stem",
        "body",
        "head",
        "out",
    }
    assert sorted(path.name for path in saved.iterdir()) == ["model.safetensors", "plan.json"]


def test_loading_keeps_dtype_frozen_parameters_and_the_record(tmp_path: Path) -> None:
    def make() -> nn.Module:
        model = make_model().to(torch.bfloat16)
        model.body.requires_grad_(False)
        return model

    small = factorized(make(), make_data()[0].bfloat16())
    rankfold.save(small, tmp_path / "small")
    loaded = rankfold.load(tmp_path / "small", make)
    assert not loaded.body[0].weight.requires_grad and loaded.head[0].weight.requires_grad
    assert loaded.head[0].weight.dtype == torch.bfloat16
    assert rankfold.record_of(loaded).plan == rankfold.record_of(small).plan
    assert not loaded.training
    rankfold.save(loaded, tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (
        tmp_path / "small/model.safetensors"
    ).read_bytes()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 64)
        self.hidden = nn.Linear(64, 64)
        self.again = self.hidden
        self.output = nn.Linear(64, 20, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.output(self.again(self.hidden(self.embedding(tokens))))


def test_shared_weights_and_layers_stay_shared(tmp_path: Path) -> None:
    tokens = torch.arange(6).reshape(2, 3)
    model = Tied().eval()
    for layers in ("*", "hidden"):
        analysis = rankfold.analyze(model, [tokens], layers=layers)
        small = rankfold.factorize(model, analysis.plan(fraction=0.25))
        rankfold.save(small, tmp_path / "small", force=True)
        table = ("embedding.0.weight", "embedding.1.weight")
        assert set(load_file(tmp_path / "small/model.safetensors")) == {
            *(table if layers == "*" else ("embedding.weight",)),
            *(f"hidden.{factor}" for factor in ("0.weight", "1.weight", "1.bias")),
        }
        loaded = rankfold.load(tmp_path / "small", Tied)
        assert loaded.again is loaded.hidden
        if layers == "*":
            assert loaded.output[0].weight is loaded.embedding[1].weight
            assert loaded.output[1].weight is loaded.embedding[0].weight
        else:
            assert loaded.output.weight is loaded.embedding.weight
        with torch.no_grad():
            assert torch.equal(loaded(tokens), small(tokens))


def edit(saved: Path, key: str, value: object) -> None:
    document = json.loads((saved / "plan.json").read_text())
    document[key] = value
    (saved / "plan.json").write_text(json.dumps(document))


def rewrite(saved: Path, change) -> None:
    """Change the tensors, and make plan.json belong to the changed file."""
    tensors = load_file(saved / "model.safetensors")
    change(tensors)
    save_file(tensors, saved / "model.safetensors")
    edit(saved, "weights_sha256", checkpoint._file_sha256(saved / "model.safetensors"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: truncate(s / "plan.json"), "plan.json is damaged"),
        (lambda s: truncate(s / "model.safetensors"), "model.safetensors is damaged"),
        (lambda s: flip_a_bit(s / "model.safetensors"), "SHA-256"),
        (lambda s: (s / "plan.json").write_text("[" * 100_000), "plan.json is damaged"),
        (lambda s: (s / "plan.json").write_bytes(b"\xff\xfe"), "plan.json is damaged"),
        (lambda s: (s / "plan.json").write_text('{"layers": []}'), "'plan' is missing"),
        (lambda s: (s / "plan.json").unlink(), "has no plan.json"),
        (lambda s: (s / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda s: edit(s, "plan", {}), "'format_version' is missing"),
        (
            lambda s: edit(s, "strides", {"depthwise.weight": [1, 2]}),
            "strides of 'depthwise.weight'",
        ),
        (lambda s: edit(s, "strides", {"depthwise.weight": [9, 9, 3, 3]}), "does not fit"),
        (lambda s: edit(s, "strides", {"nowhere": [1]}), "strides of 'nowhere'"),
        (lambda s: rewrite(s, lambda t: t.pop("head.0.weight")), "lacks 'head.0.weight'"),
        (lambda s: rewrite(s, lambda t: t.update(x=t["depthwise.bias"].clone())), "unknown.*'x'"),
        (
            lambda s: rewrite(
                s, lambda t: t.update({"depthwise.bias": t["depthwise.bias"].half()})
            ),
            "'depthwise.bias' has dtype torch.float16",
        ),
        (
            lambda s: rewrite(s, lambda t: t.update({"depthwise.bias": torch.zeros(49)})),
            r"'depthwise.bias' has shape \(49,\)",
        ),
    ],
)
def test_a_damaged_directory_is_refused_and_the_damage_named(saved, damage, message) -> None:
    damage(saved)
    with pytest.raises(CheckpointError, match=message):
        rankfold.load(saved, make_model)


def test_a_directory_that_is_none_or_of_another_network_is_refused(saved, tmp_path) -> None:
    with pytest.raises(CheckpointError, match="not a directory"):
        rankfold.load(tmp_path / "absent", make_model)
    with pytest.raises(CheckpointError, match=r"another network.*'stem'"):
        rankfold.load(saved, lambda: nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(ModelError, match="OSError: no weights here"):
        rankfold.load(saved, fail)
    with pytest.raises(ModelError, match="int"):
        rankfold.load(saved, not_a_model)


def test_a_foreign_plan_allocates_nothing_beyond_the_dense_layer(saved: Path) -> None:
    document = json.loads((saved / "plan.json").read_text())
    for entry in document["plan"]["layers"]:
        if entry["method"]:
            entry["rank"] = [10**12 for _ in entry["rank"]]
    (saved / "plan.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"rank.*outside"):
        rankfold.load(saved, make_model)


def test_an_existing_model_is_replaced_only_by_force(saved: Path) -> None:
    other = factorized(fraction=0.4)
    before = (saved / "plan.json").read_bytes()
    with pytest.raises(CheckpointError, match="exists"):
        rankfold.save(other, saved)
    assert (saved / "plan.json").read_bytes() == before
    rankfold.save(other, saved, force=True)
    batch = make_data()[0]
    with torch.no_grad():
        assert torch.equal(rankfold.load(saved, make_model)(batch), other(batch))
    assert sorted(path.name for path in saved.iterdir()) == ["model.safetensors", "plan.json"]


def test_what_is_no_saved_model_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_text("dear")
    with pytest.raises(CheckpointError, match="no saved model"):
        rankfold.save(factorized(), tmp_path, force=True)
    with pytest.raises(CheckpointError, match="not a directory"):
        rankfold.save(factorized(), tmp_path / "photo.jpg", force=True)
    with pytest.raises(CheckpointError, match="cannot be written"):
        rankfold.save(factorized(), tmp_path / "photo.jpg" / "below")
    with pytest.raises(PlanError, match="not made by"):
        rankfold.save(make_model(), tmp_path / "dense")
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


WRITES = ("save_file", "_flush", "_file_sha256")


@pytest.mark.parametrize("step", range(8))
@pytest.mark.parametrize("over_an_old_one", [True, False])
def test_a_kill_at_any_step_leaves_the_old_model_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, over_an_old_one: bool
) -> None:
    """Every call that touches the disk is a step; the process dies before one of them."""
    old, new, target = factorized(), factorized(fraction=0.4), tmp_path / "small"
    if over_an_old_one:
        rankfold.save(old, target)
    calls = 0

    def dying(function):
        def call(*arguments, **keywords):
            nonlocal calls
            if calls == step:
                raise KeyboardInterrupt
            calls += 1
            return function(*arguments, **keywords)

        return call

    with monkeypatch.context() as patch:
        for name in WRITES:
            patch.setattr(checkpoint, name, dying(getattr(checkpoint, name)))
        for name in ("replace", "rename", "chmod", "write_text"):
            patch.setattr(Path, name, dying(getattr(Path, name)))
        try:
            rankfold.save(new, target, force=True)
            finished = True
        except KeyboardInterrupt:
            finished = False
    batch = make_data()[0]
    if not over_an_old_one and not target.exists():
        assert not finished
        return
    with torch.no_grad():
        output = rankfold.load(target, make_model)(batch)
        assert torch.equal(output, new(batch)) or (
            over_an_old_one and not finished and torch.equal(output, old(batch))
        )
        rankfold.save(new, target, force=True)  # and what is left can be saved over
        assert torch.equal(rankfold.load(target, make_model)(batch), new(batch))


def test_strides_that_overlap_are_refused(saved: Path) -> None:
    document = json.loads((saved / "plan.json").read_text())
    tensors = load_file(saved / "model.safetensors")
    name = next(name for name, one in tensors.items() if one.dim() == 2 and len(set(one.shape)) > 1)
    rows, columns = tensors[name].shape
    # As many numbers from the first to the last as there are entries, some of them the same.
    total = rows * columns - 1
    first, second = next(
        (a, (total - (rows - 1) * a) // (columns - 1))
        for a in range(2, total)
        if (total - (rows - 1) * a) % (columns - 1) == 0 and a != columns
    )
    for strides in ([first, second], [0, 1], [1, 1], [columns], [1.0, 1], [2**62, 1]):
        document["strides"] = {name: strides}
        (saved / "plan.json").write_text(json.dumps(document))
        with pytest.raises(CheckpointError, match="strides of"):
            rankfold.load(saved, make_model)


def test_links_in_a_directory_have_nothing_else_written(saved: Path, tmp_path: Path) -> None:
    """It may be from someone else, who would like another file of the user's overwritten."""
    mine = tmp_path / "mine"
    mine.write_text("mine")
    loaded = rankfold.load(saved, make_model)
    for name in ("model.safetensors.new", "plan.json.new", "report.html"):
        (saved / name).symlink_to(mine)
    rankfold.save(loaded, saved, force=True)
    rankfold.write_report(rankfold.checkpoint.read_record(saved), saved / "report.html")
    assert mine.read_text() == "mine"
    assert not any(path.is_symlink() for path in saved.iterdir())


@pytest.mark.parametrize("words", ["\x1b[2J", "\u202e"])
def test_names_that_a_terminal_would_obey_are_refused(saved: Path, words: str) -> None:
    document = json.loads((saved / "plan.json").read_text())
    document["plan"]["layers"][0]["reason"] = words
    (saved / "plan.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="control characters") as error:
        rankfold.load(saved, make_model)
    assert str(error.value).isprintable()


def test_an_elastic_part_of_other_layers_is_refused(saved: Path) -> None:
    analysis = rankfold.analyze(make_model(), [make_data()[0]], metric="weight", layers="head")
    document = json.loads((saved / "plan.json").read_text())
    document["elastic"] = checkpoint._elastic_to_json(analysis)
    document["plan"]["layers"] = document["plan"]["layers"][:1]
    document["plan"]["layers"][0]["name"] = "other"
    (saved / "plan.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError):
        rankfold.load(saved, make_model)
