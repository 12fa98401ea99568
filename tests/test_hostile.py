"""A few of the spoiled files that tools/fuzz.py has rankfold read by the hundred thousand."""

import ast
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile import SHARES, Reader, answer, case_of, make_readers

import rankfold
from rankfold.errors import RankfoldError

SOURCE = Path(rankfold.__file__).parent
FILES = 500


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    return make_readers(tmp_path_factory.mktemp("seeds"))


@pytest.mark.parametrize("name", SHARES)
def test_what_was_not_spoiled_is_read(readers, name) -> None:
    for files in readers[name].seeds:
        found = answer(readers[name], files)
        assert found.accepted and found.wrong is None, found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SHARES)
def test_spoiled_files_are_read_or_refused(readers, name) -> None:
    wrong = {}
    for seed in range(FILES * SHARES[name] // 100):
        _, files, link = case_of(readers, seed, name)
        found = answer(readers[name], files, link)
        if found.wrong is not None:
            wrong[seed] = found.wrong
    assert not wrong


def _no_file(path: Path) -> None:
    path.unlink()


def _a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _a_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def _a_link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _very_large(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(2**40)  # of nothing


@pytest.mark.parametrize(
    "spoil", [_no_file, _a_directory, _a_pipe, _a_device, _a_link_to_itself, _very_large]
)
@pytest.mark.parametrize("name", ["model", "analysis", "plan"])
def test_what_is_no_file_is_refused(
    readers, tmp_path, name: str, spoil: Callable[[Path], None]
) -> None:
    for file in readers[name].seeds[0]:
        place = tmp_path / file
        place.mkdir()
        for other, data in readers[name].seeds[0].items():
            (place / other).write_bytes(data)
        if spoil is _very_large and file.endswith(".safetensors"):
            continue  # as large as it is: its hash would have to be read
        spoil(place / file)
        with pytest.raises(RankfoldError):
            readers[name].read(place)


def test_nothing_is_unpickled_and_no_text_is_run() -> None:
    """But for the Python that `rankfold.export` writes, and runs to compare."""
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            imported = {
                alias.name for alias in getattr(node, "names", ()) if hasattr(alias, "name")
            }
            if isinstance(node, ast.ImportFrom):
                imported = {node.module or ""}
            elif not isinstance(node, ast.Import):
                imported = set()
            if imported & {
                "pickle",
                "cPickle",
                "dill",
                "cloudpickle",
                "joblib",
                "marshal",
                "shelve",
            }:
                found.append((path.name, "import"))
            if called in ("eval", "exec", "__import__", "yaml.load"):
                found.append((path.name, called))
            if "allow_pickle" in {one.arg for one in getattr(node, "keywords", ())}:
                found.append((path.name, "allow_pickle"))
            if called.endswith(("os.system", "subprocess.run", "subprocess.Popen")):
                found.append((path.name, called))
            if called == "torch.load":
                safe = [one for one in node.keywords if one.arg == "weights_only"]
                if not safe or ast.unparse(safe[0].value) != "True":
                    found.append((path.name, called))
    assert found == [("source.py", "exec")]
