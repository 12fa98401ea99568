"""What the README shows, runs."""

import re
from pathlib import Path

import pytest

from rankfold import demo

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(example.strip().splitlines()) <= 15
    # Fewer batches than a reader has: this is about running at all.
    for name in ("make_data", "make_test"):
        batches = getattr(demo, name)()[:6]
        monkeypatch.setattr(demo, name, lambda batches=batches: batches)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    assert "MACs per sample" in capsys.readouterr().out
    assert Path("small/plan.json").is_file()


def test_there_are_exactly_two_set_up_commands() -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    for command in ("demo", "test"):
        assert f"make {command} " in README
        assert re.search(rf"^{command}: \.venv-{command}/installed", makefile, re.MULTILINE)
