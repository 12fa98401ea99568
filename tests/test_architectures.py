"""The quickest and most telling cases of the sweep over architectures (benchmarks/sweep.py)."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

BENCHMARKS = str(Path(__file__).parent.parent / "benchmarks")
sys.path.insert(0, BENCHMARKS)
from architectures import FAMILIES, every, family_of  # noqa: E402
from architectures.conformance import CHECKS, examine  # noqa: E402

sys.path.remove(BENCHMARKS)

ALL = every()
# Those that take seconds each are for the sweep.
QUICK = [name for name in CHECKS if name not in ("compress", "measure", "exported", "ONNX")]
TELLING = {
    "WaveNet, causal dilated": QUICK,  # asks its layers for their dilation
    "Two linear layers with one weight": QUICK,
    "Weight norm (hook)": QUICK,
    "Layers in a plain list too": QUICK,
    "Autocast in the forward": QUICK,
    "Mixture with an unused expert": QUICK,
    "GRU, last state of two layers": QUICK,
    "Outputs of every type": QUICK,
    "State kept in attributes": QUICK,
    "GraphModule of torch.fx": ["compress"],
}


@pytest.fixture(autouse=True)
def no_process_group() -> Iterator[None]:
    """That of the wrapped network is not left to other tests."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", TELLING)
def test_everything_holds(name) -> None:
    outcome = examine(ALL[name], TELLING[name])
    assert outcome.status == "passed", outcome.failures


@pytest.mark.parametrize("name", [name for name, one in ALL.items() if one.refusal is not None])
def test_what_cannot_be_compressed_is_refused_in_words(name) -> None:
    outcome = examine(ALL[name])
    assert outcome.status == "refused", outcome.said


def test_every_family_is_in_the_document() -> None:
    document = (Path(BENCHMARKS).parent / "docs" / "architectures.md").read_text()
    for family in FAMILIES:
        assert f"<!-- {family} -->\n" in document and f"<!-- end of {family} -->" in document
    assert family_of("U-Net") == "dense_prediction"
