"""What the documents show, runs; what they name, is there."""

import importlib
import re
from pathlib import Path

import pytest
from networks import make_data, make_model

import rankfold

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md"])


def blocks_of(document: Path, language: str = r"\w*") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), re.M | re.S)


def test_getting_started_runs(tmp_path, monkeypatch, capsys) -> None:
    """With a small network in the place of the reader's."""
    monkeypatch.chdir(tmp_path)
    namespace = {"make_model": make_model, "make_data": make_data}
    for block in blocks_of(ROOT / "docs" / "getting-started.md", "python"):
        exec(compile(block, "getting-started.md", "exec"), namespace)
    told = capsys.readouterr().out
    assert "latency per batch" in told and "other sizes that it takes" in told
    assert Path("small.onnx").is_file() and Path("report.html").is_file()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_what_is_named_is_there(document) -> None:
    text = document.read_text()
    for name in re.findall(r"rankfold((?:\.[A-Za-z_]\w*)+)", text):
        found = rankfold
        path = "rankfold"
        for part in name.strip(".").split("."):
            path += f".{part}"
            if not hasattr(found, part):
                importlib.import_module(path)  # a module, or this fails
            found = getattr(found, part)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_links_and_scripts_exist(document) -> None:
    text = document.read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (document.parent / target).exists(), target
    for script in re.findall(r"`((?:benchmarks|examples|docs|src|tests)/[\w./]+\.\w+)", text):
        assert (ROOT / script).exists(), script


def test_every_document_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    named = re.findall(r"[\w-]+\.md", text)
    assert sorted(named) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    assert "strict: true" in text
