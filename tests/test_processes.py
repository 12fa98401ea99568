"""Two processes do together what one does alone. One launch for all: it takes its time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from networks import make_data, make_model

import rankfold
from rankfold import processes
from rankfold.errors import RankfoldError

HERE = Path(__file__).parent


def together(script: str, directory: Path, count: int = 2) -> str:
    """What a script prints in so many processes that meet over gloo; its errors are this test's."""
    path = directory / "script.py"
    path.write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    environment = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [*command, str(count), str(path)],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout


COMPRESSION = """
import sys
import pytest
import torch
from networks import make_data, make_model
import rankfold
from rankfold import processes
from rankfold.cli import main
from rankfold.errors import ModelError

model, data = make_model(), make_data()
analysis = rankfold.analyze(model, data, batches=5)
assert processes.count() == 2
small = rankfold.factorize(model, analysis.plan(macs=0.4))
recovery = rankfold.recover(small, data, teacher=model, epochs=2, checkpoint="state.pt")
rankfold.save(small, "small")
timed = rankfold.with_timings(analysis, model, data)
assert processes.gathered(timed.timing.dense_ms) == [timed.timing.dense_ms] * 2
if processes.is_first():
    analysis.save("analysis")
weights = torch.cat([parameter.detach().flatten() for parameter in small.parameters()])
assert all(torch.equal(weights, other) for other in processes.gathered(weights))
torch.save([epoch.loss for epoch in recovery.epochs], f"losses{processes.index()}.pt")

# What one fails with all do, and nobody waits.
assert processes.shared_out(range(5), lambda n: (n, processes.count())) == [
    (n, 1) for n in range(5)
]
sums = processes.add_up({"both": torch.ones(2), f"own {processes.index()}": torch.ones(3)})
assert sorted(sums) == ["both", "own 0", "own 1"]
assert sums["both"].tolist() == [2, 2] and sums["own 1"].tolist() == [1, 1, 1]
assert processes.mean(float(processes.index())) == 0.5
assert processes.from_first(processes.is_first)

def work(n):
    if n == 3:
        raise ModelError("layer 3 is wrong")
    return n

with pytest.raises(ModelError, match="layer 3 is wrong"):
    processes.shared_out(range(5), work)
with pytest.raises(ModelError, match="layer 3 is wrong"):
    processes.from_first(lambda: work(3))

with processes.by_itself():
    assert processes.count() == 1 and processes.is_first()
    assert processes.gathered("only this one") == ["only this one"]

# The command line, which parts from the others at the end.
names = ["networks:make_model", "--data", "networks:make_data", "--test", "networks:make_labelled"]
options = ["--metric", "rankfold:accuracy", "--macs", "0.5", "--epochs", "1", "--json"]
sys.argv = ["rankfold", "compress", *names, *options, "--out", "by_command"]
main()
"""


def test_a_network_is_compressed_as_by_one_process(tmp_path) -> None:
    told = json.loads(together(COMPRESSION, tmp_path))  # of one process alone
    assert told["out"] == "by_command" and (tmp_path / "by_command" / "plan.json").is_file()
    model, data = make_model(), make_data()
    analysis = rankfold.analyze(model, data, batches=5)
    theirs = rankfold.Analysis.load(tmp_path / "analysis")
    assert theirs.metric == analysis.metric
    for one, other in zip(theirs.layers, analysis.layers, strict=True):
        assert one.reason == other.reason
        for ours, found in zip(other.candidates, one.candidates, strict=True):
            assert (found.method, found.rank, found.macs) == (ours.method, ours.rank, ours.macs)
            assert found.loss == pytest.approx(ours.loss, rel=1e-3)
    # A step takes one batch of each of two processes, or two of one.
    small = rankfold.factorize(model, analysis.plan(macs=0.4))
    recovery = rankfold.recover(small, data, teacher=model, epochs=2, accumulation=2)
    found = torch.load(tmp_path / "losses0.pt", weights_only=True)
    assert found == torch.load(tmp_path / "losses1.pt", weights_only=True)
    assert found[1:] == pytest.approx([epoch.loss for epoch in recovery.epochs[1:]], rel=1e-3)
    loaded = rankfold.load(tmp_path / "small", make_model)
    batch = data[0]
    assert (loaded(batch) - small.eval()(batch)).norm() < 1e-2 * small(batch).norm()


def test_seeds_of_items_differ_in_what_the_generator_looks_at() -> None:
    seeds = [processes.seed_of(seed, item) for seed in range(20) for item in range(20)]
    assert len(set(seeds)) == 400 and all(0 <= seed < 2**32 for seed in seeds)
    assert processes.seed_of(0, 7) == 7


def test_one_process_has_all_to_itself() -> None:
    assert processes.count() == 1 and processes.index() == 0 and processes.is_first()
    assert processes.own([1, 2, 3]) == [1, 2, 3] and processes.gathered(4) == [4]
    assert processes.shared_out([1, 2], lambda n: -n) == [-1, -2]
    assert processes.from_first(lambda: 5) == 5 and processes.mean(2.0) == 2.0
    assert processes.add_up({"a": torch.ones(1)})["a"].item() == 1

    def fails(_: int) -> None:
        raise RankfoldError("no")

    with pytest.raises(RankfoldError, match="no"):
        processes.shared_out([1], fails)
