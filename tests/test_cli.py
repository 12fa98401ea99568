import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import rankfold
from rankfold.cli import console, main
from rankfold.cli.inputs import origin_of
from rankfold.journal import Journal

DATA = ["--data", "networks:make_data"]
MODEL = ["networks:make_model", *DATA]
LABELLED = ["--test", "networks:make_labelled", "--metric", "rankfold:accuracy"]


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit status of `rankfold <arguments>`, in this process."""
    monkeypatch.setattr(sys, "argv", ["rankfold", *arguments])
    with pytest.raises(SystemExit) as exited:
        main()
    return exited.value.code or 0


def run_json(monkeypatch, capsys, *arguments: str) -> dict:
    assert run(monkeypatch, *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_compress_then_evaluate_tell_the_same(monkeypatch, capsys) -> None:
    told = run_json(
        monkeypatch, capsys, "compress", *MODEL, *LABELLED, "--macs", "0.5", "--out", "small"
    )
    for side in ("before", "after"):
        assert {"parameters", "macs", "latency_ms", "metric"} <= told[side].keys()
    assert told["after"]["macs"] <= 0.5 * told["before"]["macs"]
    assert told["before"]["metric"] == 1.0
    again = run_json(monkeypatch, capsys, "evaluate", "small", "--trust")
    for key in ("parameters", "macs", "metric"):
        assert again["after"][key] == told["after"][key]
        assert again["before"][key] == told["before"][key]
    assert sorted(path.name for path in Path().iterdir()) == ["small"]


def test_an_elastic_network_is_sliced(monkeypatch, capsys) -> None:
    arguments = ["--macs", "0.7", "--elastic", "0.4", "--epochs", "1", "--out", "elastic"]
    assert run(monkeypatch, "compress", *MODEL, *arguments) == 0
    capsys.readouterr()
    told = run_json(
        monkeypatch, capsys, "slice", "elastic", "--macs", "0.5", "--out", "small", "--trust"
    )
    plan = told["plan"]
    assert told["out"] == "small" and plan["request"] == {"macs": 0.5}
    assert plan["after"]["macs"] <= 0.5 * plan["before"]["macs"]
    again = run_json(monkeypatch, capsys, "evaluate", "small", "--trust")
    assert again["after"]["macs"] == plan["after"]["macs"]
    more = ["--merge", "networks:make_data", "--trust"]
    assert run(monkeypatch, "slice", "elastic", "--macs", "0.4", "--out", "least", *more) == 0
    assert "saved to least" in capsys.readouterr().out
    assert run(monkeypatch, "evaluate", "least", "--trust") == 0


def test_out_may_be_the_working_directory_or_below_one_that_is_not_there(monkeypatch) -> None:
    for out in (".", "deep/er/small"):
        assert run(monkeypatch, "compress", *MODEL, "--out", out, "--force", "--epochs", "1") == 0
        assert Path(out, "model.safetensors").is_file()
    assert sorted(map(str, Path().rglob("*.pt*"))) == []


def test_inspect_draws_and_saves_what_it_found(monkeypatch, capsys) -> None:
    more = ["--plot", "picture.png", "--save-analysis", "analysis", "--keep", "head"]
    assert run(monkeypatch, "inspect", *MODEL, "--macs", "0.6", *more) == 0
    printed = capsys.readouterr().out
    assert "kept dense, as asked" in printed and "rank correlation of predicted" in printed
    assert Path("picture.png").read_bytes().startswith(b"\x89PNG")
    plan = rankfold.Analysis.load("analysis").plan(macs=0.5)
    assert plan.after.macs <= 0.5 * plan.before.macs


def test_compress_takes_a_drop_of_the_metric_instead_of_a_budget(monkeypatch, capsys) -> None:
    drop = ["--max-drop", "0.1", "--epochs", "0", "--loss-metric", "weight", "--out", "small"]
    told = run_json(monkeypatch, capsys, "compress", *MODEL, *LABELLED, *drop)
    assert told["after"]["metric"] >= 0.9 and told["after"]["macs"] < told["before"]["macs"]


def test_inspect_shows_every_layer_with_a_reason(monkeypatch, capsys) -> None:
    told = run_json(monkeypatch, capsys, "inspect", *MODEL, "--fraction", "0.25")
    layers = {layer["name"]: layer for layer in told["layers"]}
    assert layers["body"]["rank"] == [16, 8]
    assert "grouped" in layers["depthwise"]["reason"]
    assert told["after"]["macs"] < told["before"]["macs"] and told["after"]["metric"] is None
    assert run(monkeypatch, "inspect", *MODEL, "--fraction", "0.25") == 0
    table = capsys.readouterr().out
    assert "16x8" in table and "grouped convolution, groups=48" in table


def test_methods_are_chosen_by_name(monkeypatch, capsys) -> None:
    methods = ["--methods", "cp", "--methods", "interpolative", "--loss-metric", "weight"]
    told = run_json(monkeypatch, capsys, "inspect", *MODEL, "--macs", "0.4", *methods)
    chosen = {layer["name"]: layer["method"] for layer in told["layers"]}
    assert chosen["body"] == "cp" and set(chosen.values()) <= {"cp", "interpolative", None}


def test_compress_prints_tables_and_recovers_on_labels(monkeypatch, capsys) -> None:
    arguments = ["--loss", "torch.nn.functional:cross_entropy", "--epochs", "1", "--threads", "2"]
    labelled = ["networks:make_model", "--data", "networks:make_labelled"]
    assert run(monkeypatch, "compress", *labelled, *arguments, "--out", "small") == 0
    printed = capsys.readouterr().out
    assert "MACs per sample" in printed and "saved to small" in printed


def test_recovery_is_told_how(monkeypatch, capsys) -> None:
    more = ["--distance", "divergence", "--accumulation", "2", "--precision", "bfloat16"]
    arguments = ["compress", *MODEL, "--macs", "0.5", "--epochs", "1", "--out", "small"]
    assert run(monkeypatch, *arguments, *more, "--tensorboard", "log") == 0
    assert list(Path("log").iterdir())
    assert run(monkeypatch, *arguments, "--force", "--distance", "taste") == 2


def test_the_same_seed_gives_the_same_files(monkeypatch) -> None:
    # Which memory format is faster is measured, and decides the order of sums: keep the one it has.
    monkeypatch.setattr(
        sys.modules["rankfold.compress"], "in_fastest_memory_format", lambda model, *_: model
    )
    arguments = ["compress", *MODEL, "--macs", "0.5", "--epochs", "1", "--seed", "3"]
    for out in ("one", "two"):
        assert run(monkeypatch, *arguments, "--out", out) == 0
    first, second = (Path(out, "model.safetensors").read_bytes() for out in ("one", "two"))
    assert first == second


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "networks", *DATA], "not of the form package.module:name"),
        (["inspect", "absent_module:make", *DATA], "importing absent_module failed"),
        (["inspect", "networks:absent", *DATA], "no 'absent'"),
        (["inspect", "networks:fail", *DATA], "'networks:fail' failed: OSError: no weights here"),
        (["inspect", "networks:not_a_model", *DATA], "gives a int, not an nn.Module"),
        (["inspect", "networks:make_model", "--data", "networks:make_nothing"], "no batch"),
        (["inspect", "networks:make_model", "--data", "networks:make_nan"], "NaN"),
        (["inspect", "networks:make_model", "--data", "networks:fail"], "failed: OSError"),
        (["inspect", "networks:make_model", "--data", "networks:make_wrong_shape"], "2x5x8x8"),
        (["inspect", *MODEL, "--macs", "0.0001"], "the smallest that can be reached is"),
        (["inspect", *MODEL, "--metric", "networks:make_data"], "TypeError"),
        (["inspect", *MODEL, "--layers", "depthwise"], "'depthwise' cannot be factorized"),
        (["inspect", *MODEL, "--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
        (["inspect", *MODEL, "--device", "abacus"], "device 'abacus' cannot be used here"),
        (["compress", *MODEL, "--out", "taken"], "taken exists"),
        (["inspect", *MODEL, "--loss-metric", "taste"], "no metric 'taste'"),
        (["inspect", *MODEL, "--methods", "taste"], "no method 'taste'; there are all, tucker2"),
        (["inspect", *MODEL, "--macs", "0.5", "--keep", "nowhere"], "no layer matches 'nowhere'"),
        (["compress", *MODEL, "--out", "x", "--macs", "0.5", "--max-drop", "0.1"], "not for both"),
        (["compress", *MODEL, "--out", "foreign", "--force"], "no saved model"),
        (["compress", *MODEL, "--out", "file/below"], "cannot be written"),
        (["compress", *MODEL, "--out", "x", "--macs", "0.5", "--evbmf"], "ask for one thing"),
        (
            ["compress", *MODEL, "--out", "x", "--loss", "torch.nn.functional:cross_entropy"],
            "no label",
        ),
        (["evaluate", "absent"], "not a directory"),
        (["slice", "absent", "--out", "x", "--macs", "0.5"], "not a directory"),
        (
            ["compress", *MODEL, "--out", "x", "--macs", "0.5", "--elastic", "0.6"],
            "elastic=0.6 is not between 0 and macs=0.5",
        ),
        (
            ["compress", *MODEL, "--out", "x", "--macs", "0.5", "--elastic", "0.2", "--merge"],
            "merged when cut",
        ),
        (["evaluate", "foreign"], "no plan.json"),
    ],
)
def test_bad_input_is_one_line_and_status_2(monkeypatch, capsys, arguments, message) -> None:
    Path("taken").mkdir()
    Path("taken/plan.json").write_text("{}")
    Path("foreign").mkdir()
    Path("foreign/photo.jpg").write_text("dear")
    Path("file").write_text("")
    before = sorted(str(path) for path in Path().rglob("*"))
    assert run(monkeypatch, *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    # But for what was finished before.
    after = [path for path in Path().rglob("*") if ".x.journal" not in path.parts]
    assert sorted(map(str, after)) == before


def test_the_program_is_installed() -> None:
    program = Path(sys.executable).with_name("rankfold")
    done = subprocess.run([program, "--help"], capture_output=True, text=True, check=True)
    for command in ("demo", "inspect", "compress", "evaluate"):
        assert command in done.stdout


def test_a_saved_model_is_reported_and_exported(monkeypatch, capsys) -> None:
    arguments = [*MODEL, *LABELLED, "--macs", "0.5", "--epochs", "1", "--out", "small"]
    assert run(monkeypatch, "compress", *arguments) == 0
    assert "report: small/report.html" in capsys.readouterr().out
    page = Path("small/report.html").read_text()
    assert '"command": "rankfold compress networks:make_model --data networks:make_data' in page
    assert run(monkeypatch, "report", "small", "--out", "again.html", "--title", "Again") == 0
    assert "<title>Again</title>" in Path("again.html").read_text()
    capsys.readouterr()
    told = run_json(
        monkeypatch, capsys, "export", "small", "small.onnx", "--threads", "1", "--trust"
    )
    assert told["path"] == "small.onnx" and told["dynamic"] == ["batch"]
    assert told["metric"][0] == told["metric"][1] and told["output_error"] < 1e-5
    assert (
        run(
            monkeypatch, "export", "small", "small.pt2", "--trust", "--dynamic", "none", "--no-fold"
        )
        == 0
    )
    assert "size of the file" in capsys.readouterr().out
    assert run(monkeypatch, "export", "small", "source", "--trust") == 0
    capsys.readouterr()
    assert {path.name for path in Path("source").iterdir()} == {
        "architecture.py",
        "model.safetensors",
    }
    told = run_json(monkeypatch, capsys, "export", "small", "other.d", "--to", "python", "--trust")
    assert told == {"path": "other.d/architecture.py"}
    assert run(monkeypatch, "export", "small", "small.xyz", "--trust") == 2
    assert "does not tell the format" in capsys.readouterr().err


def test_a_recipe_repeats_a_run_and_the_command_line_goes_before(monkeypatch, capsys) -> None:
    asked = [*MODEL, "--macs", "0.5", "--keep", "stem", "--keep", "head", "--epochs", "0"]
    arguments = [*asked, "--loss-metric", "weight", "--distance", "cosine", "--merge"]
    told = run_json(
        monkeypatch, capsys, "compress", *arguments, "--out", "small", "--save-recipe", "it.toml"
    )
    text = Path("it.toml").read_text()
    for line in (
        'model = "networks:make_model"',
        'keep = ["stem", "head"]',
        "macs = 0.5",
        'loss-metric = "weight"',
        'distance = "cosine"',
        "merge = true",
        'out = "small"',
    ):
        assert line in text.splitlines()
    assert "save-recipe" not in text and "seed" not in text
    again = run_json(monkeypatch, capsys, "compress", "--config", "it.toml", "--out", "again")
    for key in ("parameters", "macs"):
        assert again["after"][key] == told["after"][key]
    plans = [json.loads(Path(n, "plan.json").read_text())["plan"] for n in ("small", "again")]
    assert plans[0] == plans[1]
    fewer = ["--config", "it.toml", "--out", "fewer", "--macs", "0.45"]
    assert (
        run_json(monkeypatch, capsys, "compress", *fewer)["after"]["macs"] < told["after"]["macs"]
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("speed = 3", "no option 'speed'; there are"),
        ('config = "other.toml"', "no option 'config'"),
        ('keep = "stem"', "'keep' is 'stem', not a list"),
        ("macs = [0.5]", "'macs' is [0.5], not one value"),
        ("macs = {a = 1}", "not one value"),
        ("macs 0.5", "cannot be read"),
    ],
)
def test_recipes_that_cannot_be_followed_are_refused(monkeypatch, capsys, text, words) -> None:
    Path("it.toml").write_text(text)
    assert run(monkeypatch, "compress", "--config", "it.toml", *MODEL, "--out", "small") == 2
    assert words in capsys.readouterr().err
    assert run(monkeypatch, "compress", "--config", "no.toml", *MODEL, "--out", "small") == 2
    assert "cannot be read" in capsys.readouterr().err


def test_quiet_is_quiet_and_the_version_is_said(monkeypatch, capsys) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"rankfold {rankfold.__version__}\n"
    arguments = [*MODEL, "--macs", "0.5", "--epochs", "0", "--loss-metric", "weight"]
    assert run(monkeypatch, "--quiet", "compress", *arguments, "--out", "small") == 0
    assert capsys.readouterr() == ("", "")
    told = run_json(monkeypatch, capsys, "--quiet", "evaluate", "small", "--trust")
    assert "after" in told
    assert run(monkeypatch, "evaluate", "small", "--trust") == 0
    assert "latency per batch" in capsys.readouterr().out


# Without 2-D convolutions no memory format is chosen by the clock.
SIGNALS = ["networks:make_perceptron", "--data", "networks:make_vectors", "--params", "0.6"]


def weights(name: str) -> bytes:
    return Path(name, "model.safetensors").read_bytes()


def test_killed_and_started_again_it_ends_with_the_same(monkeypatch, capsys) -> None:
    run_json(monkeypatch, capsys, "compress", *SIGNALS, "--threads", "1", "--out", "whole")
    assert not list(Path().glob(".*"))
    command = [str(Path(sys.executable).with_name("rankfold")), "compress", *SIGNALS]
    command += ["--threads", "1", "--out", "small"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen(command, env=environment)
    until = time.monotonic() + 120
    while not list(Path().glob(".small.journal/analysis/*.entry")) and time.monotonic() < until:
        time.sleep(0.005)
    assert run(monkeypatch, "compress", *SIGNALS, "--threads", "1", "--out", "small") == 2
    assert f"in use by process {process.pid} on" in " ".join(capsys.readouterr().err.split())
    process.kill()
    process.wait()
    assert not Path("small").exists()
    other = [*SIGNALS[:-1], "0.5", "--threads", "1", "--out", "small"]
    assert run(monkeypatch, "compress", *other) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "params was 0.6, is 0.5" in told and "--force" in told
    run_json(monkeypatch, capsys, "compress", *SIGNALS, "--threads", "1", "--out", "small")
    assert weights("small") == weights("whole")
    assert not list(Path().glob(".*"))


def test_killed_while_the_model_is_put_in_place_it_is_whole_or_not_there(
    monkeypatch, capsys
) -> None:
    arguments = ["compress", *SIGNALS, "--out", "small"]
    remove = Journal.remove
    monkeypatch.setattr(Journal, "remove", lambda journal: None)
    run_json(monkeypatch, capsys, *arguments)
    before = weights("small")
    monkeypatch.setattr(Journal, "remove", remove)
    run_json(monkeypatch, capsys, *arguments)  # nothing was left to do but to clear up
    assert weights("small") == before and not list(Path().glob(".*"))
    assert run(monkeypatch, *arguments) == 2
    assert "small exists" in capsys.readouterr().err

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    other = ["compress", *SIGNALS[:-1], "0.5", "--force", "--out"]
    module = sys.modules["rankfold.cli.compress"]
    for out, holder, name in (("new", Path, "rename"), ("small", module, "replace_file")):
        with monkeypatch.context() as patched:
            patched.setattr(holder, name, stop)
            assert run(patched, *other, out) == 130
        assert Path(out).exists() == (out == "small")
        run_json(monkeypatch, capsys, *other, out)
        assert weights(out) != before and not list(Path().glob(".*"))
    assert weights("new") == weights("small")
    reports = [Path(out, "report.html").read_text() for out in ("new", "small")]
    assert len(reports[0]) > 1000 and '"params": 0.5' in reports[1]


def test_logs_get_a_line_now_and_then(monkeypatch, capsys) -> None:
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    for _ in console.progress(range(100), "working"):
        now[0] += 4
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "working: 8 of 100, about 6 min left"
    assert 10 <= len(lines) <= 13 and "\x1b" not in "".join(lines)
    assert list(console.progress(iter("abc"), "soon done")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_what_a_saved_model_names_is_run_only_if_it_is_trusted(monkeypatch, capsys) -> None:
    arguments = [*MODEL, *LABELLED, "--macs", "0.5", "--epochs", "0", "--out", "small"]
    assert run(monkeypatch, "compress", *arguments, "--loss-metric", "weight") == 0
    Path("evil.py").write_text("raise SystemExit('run')")
    document = json.loads(Path("small/plan.json").read_text())
    document["origin"] = dict.fromkeys(("model", "data", "test", "metric", "forward"), "evil:it")
    Path("small/plan.json").write_text(json.dumps(document))
    capsys.readouterr()
    for command in (
        ["evaluate", "small"],
        ["export", "small", "small.onnx"],
        ["slice", "small", "--out", "x", "--macs", "0.3"],
    ):
        assert run(monkeypatch, *command) == 2
        told = " ".join(capsys.readouterr().err.split())
        assert "--trust" in told and "evil:it" in told
    # Naming model and data does not make the rest of it trusted.
    assert run(monkeypatch, "evaluate", "small", "--model", MODEL[0], *DATA) == 0
    assert "evil" not in sys.modules
    assert run(monkeypatch, "evaluate", "small", "--trust") == "run"


def test_the_network_that_ships_with_it_needs_no_trust(tmp_path) -> None:
    (tmp_path / "plan.json").write_text(
        json.dumps(
            {
                **{key: {} for key in ("plan", "strides")},
                **dict.fromkeys(("source_sha256", "weights_sha256"), ""),
                "origin": {"model": "rankfold.demo:make_model", "data": "rankfold.demo:os.abort"},
            }
        )
    )
    assert origin_of(tmp_path, False) == {"model": "rankfold.demo:make_model"}


def test_a_recipe_that_is_hostile_is_one_line(monkeypatch, capsys) -> None:
    for text in ("macs = " + "9" * 10_000, "keep = " + "[" * 5000 + "]" * 5000, "model = 1\n" * 2):
        Path("it.toml").write_text(text)
        assert run(monkeypatch, "compress", "--config", "it.toml") == 2
        assert "cannot be read" in capsys.readouterr().err


def test_logs_are_wide_enough_for_the_names_of_layers(monkeypatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert console._width(io.StringIO()) == 120
    monkeypatch.setenv("COLUMNS", "60")
    assert console._width(io.StringIO()) is None
