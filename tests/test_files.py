from pathlib import Path

import pytest

from rankfold.files import replace_file


def test_a_file_is_replaced_and_a_link_is_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    for name in ("it", "it.new"):
        (tmp_path / name).symlink_to(elsewhere)
    replace_file(tmp_path / "it", lambda path: path.write_text("new"))
    assert elsewhere.read_text() == "mine"
    assert (tmp_path / "it").read_text() == "new" and not (tmp_path / "it").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "it"]


def test_what_fails_leaves_the_old_file_alone(tmp_path: Path) -> None:
    (tmp_path / "it").write_text("old")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        replace_file(tmp_path / "it", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["it"]
    assert (tmp_path / "it").read_text() == "old"
