from pathlib import Path

import pytest
from networks import make_data, make_model

import rankfold
from rankfold.errors import RankfoldError
from rankfold.picture import draw_analysis


@pytest.mark.parametrize("metric", ["auto", "weight"])
@pytest.mark.parametrize("ending", ["png", "svg"])
def test_an_analysis_is_drawn(tmp_path: Path, metric, ending) -> None:
    analysis = rankfold.analyze(make_model(), make_data(), metric=metric)
    path = tmp_path / f"analysis.{ending}"
    draw_analysis(analysis, analysis.plan(macs=0.5), path)
    head = path.read_bytes()[:300]
    assert head.startswith(b"\x89PNG") if ending == "png" else b"<svg" in head or b"<?xml" in head
    assert path.stat().st_size > 20_000


def test_a_file_that_cannot_be_written_is_a_typed_error(tmp_path: Path) -> None:
    analysis = rankfold.analyze(make_model(), make_data(), metric="weight")
    for path in (tmp_path / "picture.poem", tmp_path / "nowhere" / "picture.png"):
        with pytest.raises(RankfoldError, match="cannot be written"):
            draw_analysis(analysis, analysis.plan(macs=0.5), path)
