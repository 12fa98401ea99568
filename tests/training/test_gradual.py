"""Ranks cut in steps."""

import contextlib
import copy
import itertools

import pytest
import torch
from networks import make_data, make_labelled, make_model
from torch import nn

import rankfold
from rankfold.errors import BudgetError, JournalError, RankfoldError
from rankfold.fingerprint import weights_sha256
from rankfold.training import gradually


class Watch:
    """Progress that remembers what was done."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def __call__(self, work, description, total=None):
        self.done.append(description.split(",")[0])
        return work


def test_the_budget_is_reached_in_steps_that_recover() -> None:
    model, data = make_model(), make_data()
    weights = copy.deepcopy(model.state_dict())
    watch = Watch()
    small = gradually(model, data, macs=0.3, steps=3, epochs=1, progress=watch)
    comparison = rankfold.measure(model, small, data)
    assert comparison.after.macs <= 0.3 * comparison.before.macs
    kinds = [one for one in watch.done if one in ("gathering moments", "factorizing", "recovering")]
    assert kinds == ["gathering moments", "factorizing", "recovering"] * 3
    # What was factorized last is what the recovery before it left.
    assert rankfold.record_of(small).source_sha256 != weights_sha256(model)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_what_comes_out_is_saved_and_loaded_as_of_the_original(tmp_path) -> None:
    small = gradually(make_model(), make_data(), params=0.4, macs=0.5, steps=2, epochs=1).eval()
    record = rankfold.record_of(small)
    assert record.plan.request == {"params": 0.4, "macs": 0.5} and record.recovery is not None
    rankfold.save(small, tmp_path / "small")
    again = rankfold.load(tmp_path / "small", like=make_model)
    assert torch.equal(again(make_data()[0]), small(make_data()[0]))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_one_step_is_factorize_and_recover(precision) -> None:
    model, data = make_model(), make_data()
    small = gradually(model, data, macs=0.4, steps=1, epochs=1, precision=precision)
    expected = rankfold.factorize(model, rankfold.analyze(model, data).plan(macs=0.4))
    rankfold.recover(expected, data, teacher=model, epochs=1, precision=precision)
    for name, value in expected.state_dict().items():
        assert torch.equal(small.state_dict()[name], value)


def test_absolute_budgets_are_the_same_as_fractions() -> None:
    model, data = make_model(), make_data()
    macs = rankfold.analyze(model, data, metric="weight").macs / 8
    settings = {"steps": 2, "epochs": 1, "loss_metric": "weight"}
    ours = gradually(model, data, macs=0.4, **settings)
    theirs = gradually(model, data, macs=0.4 * macs, **settings)
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(theirs.state_dict()[name], value)


def test_it_trains_on_labels() -> None:
    small = gradually(
        make_model(),
        make_labelled(),
        macs=0.4,
        steps=2,
        epochs=1,
        loss_fn=nn.functional.cross_entropy,
        validation=make_labelled(),
        metric=rankfold.accuracy,
    )
    scores = [epoch.score for epoch in rankfold.record_of(small).recovery.epochs]
    assert all(0 <= score <= 1 for score in scores)


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(12, 32, batch_first=True)
        self.hidden = nn.Linear(32, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(self.recurrent(tensor)[0]).relu())


def test_fewer_units_come_last(tmp_path) -> None:
    model, data = Reader().eval(), list(torch.randn(8, 4, 6, 12))
    with pytest.raises(BudgetError, match="smallest"):  # on the way linear layers are not enough
        gradually(model, data, params=0.5, steps=2, epochs=1)
    small = gradually(model, data, params=0.9, steps=2, epochs=1).eval()
    rankfold.save(small, tmp_path / "small")
    again = rankfold.load(tmp_path / "small", like=Reader)
    assert torch.equal(again(data[0]), small(data[0]))


class Interrupted(Exception):
    """In the place of a kill."""


class Interruption:
    """Progress that stops the work when the next but so many of its stages is entered."""

    def __init__(self, left: int) -> None:
        self.left = left
        self.done = 0

    def __call__(self, work, description, total=None):
        if self.left == 0:
            raise Interrupted
        self.left -= 1
        self.done += 1
        return work


def test_interrupted_again_and_again_it_goes_on_to_the_same_network(tmp_path) -> None:
    model, data = make_model(), make_data()
    settings = {"macs": 0.4, "steps": 2, "epochs": 2}
    watch = Watch()
    expected = gradually(model, data, progress=watch, **settings).state_dict()
    found, done = None, 0
    for stages in itertools.count(12, 2):  # more each time, so that it ends
        progress = Interruption(stages)
        with contextlib.suppress(Interrupted):
            found = gradually(model, data, journal=tmp_path / "j", progress=progress, **settings)
        done += progress.done
        if found is not None:
            break
    assert stages > 14 and done < 3 * len(watch.done)
    assert all(torch.equal(found.state_dict()[name], one) for name, one in expected.items())
    with pytest.raises(JournalError, match="steps was 2, is 4"):
        gradually(model, data, journal=tmp_path / "j", **{**settings, "steps": 4})


def test_what_cannot_be_done_is_said_before_any_work() -> None:
    model, data = make_model(), make_data()
    watch = Watch()
    with pytest.raises(BudgetError, match="smallest"):
        gradually(model, data, macs=1e-6, progress=watch)
    assert "factorizing" not in watch.done
    with pytest.raises(BudgetError, match="params, macs or memory"):
        gradually(model, data)
    for steps in (0, 1.5):
        with pytest.raises(RankfoldError, match="steps"):
            gradually(model, data, macs=0.5, steps=steps)
