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
from torch import nn
import rankfold
from rankfold import processes
from rankfold.cli import main
from rankfold.errors import ModelError, RankfoldError
from rankfold.recover.sharded import in_shares, put_together

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

# Each with a share of every weight, in the place of a replica.
torch.manual_seed(0)
blocks = [nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 48)) for _ in range(3)]
model = nn.Sequential(nn.Flatten(2), nn.Linear(64, 48), *blocks, nn.BatchNorm1d(3)).eval()
data = [batch[:, :, :8, :8] for batch in make_data()]
small = rankfold.factorize(model, rankfold.analyze(model, data, metric="weight").plan(params=0.6))

network = in_shares(small, torch.device("cpu"))
held = sum(share.to_local().numel() for share in network.parameters())
assert sum(processes.gathered(held)) == sum(one.numel() for one in small.parameters())
assert held < 0.6 * sum(processes.gathered(held))
whole = rankfold.factorize(model, rankfold.record_of(small).plan)
with torch.no_grad():
    for parameter in whole.parameters():
        parameter.zero_()
put_together(network, whole)
assert all(torch.equal(one, small.state_dict()[n]) for n, one in whole.state_dict().items())

def train(epochs, **settings):
    trained = rankfold.factorize(model, rankfold.record_of(small).plan)
    done = rankfold.recover(
        trained, data, teacher=model, epochs=epochs, accumulation=2, learning_rate=1e-3, **settings
    )
    return trained, [epoch.score for epoch in done.epochs]

replica, scores = train(2)
shared, same = train(2, sharded=True)
assert same == pytest.approx(scores, rel=1e-4) and scores[2] > scores[0]
for name, one in replica.state_dict().items():
    torch.testing.assert_close(shared.state_dict()[name], one, rtol=1e-3, atol=1e-4)
assert type(shared[1][0]) is nn.Linear and type(shared[1][0].weight) is nn.Parameter

def interrupt(work, description, total=None):
    if description.startswith("recovering, epoch 2"):
        raise KeyError
    return work

with pytest.raises(KeyError):
    train(2, sharded=True, checkpoint="state", progress=interrupt)
again, resumed = train(2, sharded=True, checkpoint="state")
assert resumed == same
for name, one in shared.state_dict().items():
    assert torch.equal(again.state_dict()[name], one)
with pytest.raises(RankfoldError, match="whole weights"):
    train(1, sharded=True, penalty=lambda model: 0)

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


SHARES = """
import os
import signal
import time
from pathlib import Path
import torch
from rankfold import processes
from rankfold.journal import Journal

processes.join(torch.device("cpu"))
names = [f"stage/{n}" for n in range(8)]
fatal = int(os.environ.get("FATAL", -1))

def work(n):
    with open(f"made by {os.getpid()}", "a") as file:
        file.write(f"{n} ")
    if n == fatal:
        while len(list(Path("journal/stage").glob("*.entry"))) < 6:  # of the other, and its own
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return torch.full((3,), n)

def share_out(directory):
    with Journal(directory) as book:
        book.begin(lambda: {"stage": {}})
        found = book.shared_out(names, range(8), work)
        assert [one.tolist() for one in found] == [[n] * 3 for n in range(8)]

share_out("journal")
# Of directories of their own, which they take for one, that of the first holds everything.
alone = Path(f"own-{processes.index()}")
alone.mkdir()
os.chdir(alone)
share_out("journal")
"""


def test_the_share_of_a_killed_process_is_taken_over(tmp_path, monkeypatch) -> None:
    """By others, three in the place of two; what it had finished is not done again."""
    monkeypatch.setenv("FATAL", "5")
    with pytest.raises(AssertionError, match="SIGKILL"):
        together(SHARES, tmp_path)
    shares = {path.read_text() for path in tmp_path.glob("made by *")}
    assert shares == {"0 2 4 6 ", "1 3 5 "}
    for path in tmp_path.glob("made by *"):
        path.unlink()
    monkeypatch.delenv("FATAL")
    together(SHARES, tmp_path, count=3)
    assert sorted(path.read_text() for path in tmp_path.glob("made by *")) == ["5 ", "7 "]
    entries = [len(list((tmp_path / f"own-{n}").glob("journal/stage/*.entry"))) for n in range(3)]
    assert entries == [8, 0, 0]


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
