"""Entries, locks and requests; then whole calls that are stopped wherever they can be."""

import errno
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import rankfold
from rankfold import journal as journals
from rankfold.errors import (
    CalibrationError,
    CheckpointError,
    DeviceError,
    JournalError,
    ModelError,
)
from rankfold.journal import HOLDER, LOCK, Journal, read_entry, write_entry
from rankfold.methods.svd import LowRank

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def same(first: object, second: object) -> bool:
    if isinstance(first, torch.Tensor):
        return (
            isinstance(second, torch.Tensor)
            and (first.dtype, first.shape) == (second.dtype, second.shape)
            and torch.equal(first, second)
        )
    if type(first) is not type(second):
        return False
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    made = (9 * torch.rand(shape, generator=generator)).to(draw(st.sampled_from(DTYPES)))
    order = draw(st.permutations(range(len(shape))))
    made = made.permute(order)
    if shape and made.shape[0] > 1 and draw(st.booleans()):
        made = made[::2]
    return made


primitives = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9)
)
keys = st.integers() | st.text(max_size=9)
values = st.recursive(
    primitives | tensors(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=6,
)


@given(values)
def test_what_is_written_is_read(tmp_path_factory, value) -> None:
    path = tmp_path_factory.mktemp("entry") / "below" / "it.entry"
    write_entry(path, value)
    assert same(read_entry(path), value)
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_a_tensor_keeps_the_order_of_its_modes(tmp_path) -> None:
    weight = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    write_entry(tmp_path / "it", {"weight": weight, "again": weight, "part": weight[:2]})
    found = read_entry(tmp_path / "it")
    assert found["weight"].stride() == found["again"].stride() == weight.stride()
    assert all(torch.equal(found[k], w) for k, w in (("weight", weight), ("part", weight[:2])))


def test_what_no_journal_keeps_is_refused(tmp_path) -> None:
    with pytest.raises(TypeError, match="a set is nothing"):
        write_entry(tmp_path / "it", [{1, 2}])
    assert not list(tmp_path.iterdir())


def test_an_entry_cut_off_or_changed_anywhere_is_none(tmp_path) -> None:
    path = tmp_path / "it"
    write_entry(path, {"a": torch.randn(20), "b": [1, 2]})
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_entry(path)
    for place in range(0, len(whole), 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            found = read_entry(path)
        except CheckpointError:
            continue
        write_entry(path, found)  # spaces that pad the header mean nothing
        assert path.read_bytes() == whole


def test_a_piece_is_made_once_and_again_if_its_entry_is_damaged(tmp_path) -> None:
    made: list[int] = []

    def make() -> torch.Tensor:
        made.append(1)
        return torch.ones(3)

    for _ in range(2):
        with Journal(tmp_path / "j") as journal:
            assert torch.equal(journal.once("stage/it", make), torch.ones(3))
    assert len(made) == 1
    (entry,) = (tmp_path / "j" / "stage").iterdir()
    entry.write_bytes(entry.read_bytes()[:-1])
    with Journal(tmp_path / "j") as journal:
        assert journal.kept("stage/it") is None
        journal.once("stage/it", make)
        assert len(made) == 2 and torch.equal(journal.kept("stage/it"), torch.ones(3))
        journal.forget("stage/it")
        assert journal.kept("stage/it") is None


def test_of_many_pieces_those_done_before_an_error_are_kept(tmp_path) -> None:
    done: list[int] = []

    def work(item: int) -> int:
        if item == 3 and len(done) == 3:
            raise ValueError("three")
        done.append(item)
        return item**2

    names = [f"stage/{item}" for item in range(5)]
    with pytest.raises(ValueError, match="three"), Journal(tmp_path / "j") as journal:
        journal.shared_out(names, range(5), work)
    done.append(-1)
    with Journal(tmp_path / "j") as journal:
        assert journal.shared_out(names, range(5), work) == [0, 1, 4, 9, 16]
    assert done == [0, 1, 2, -1, 3, 4]


def test_random_numbers_are_left_whether_a_piece_is_read_or_made(tmp_path) -> None:
    with Journal(tmp_path / "j") as journal:
        for book in (journal, journal, Journal()):
            torch.manual_seed(0)
            found = book.once("stage/it", lambda: torch.rand(3))
            book.shared_out(["stage/1"], [1], lambda item: torch.rand(item))
            assert torch.equal(torch.rand(3), found)


def test_without_a_directory_nothing_is_kept(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Journal() as journal:
        journal.begin(lambda: pytest.fail("nothing to tell from"))
        assert journal.once("stage/it", lambda: {1, 2}) == {1, 2}
        assert journal.kept("stage/it") is None and journal.path("stage/it") is None
        journal.forget("stage/it")
        journal.remove()
    assert not list(tmp_path.iterdir())


def test_a_journal_of_nothing_or_that_is_done_leaves_nothing(tmp_path) -> None:
    with Journal(tmp_path / "j") as journal:
        journal.begin(lambda: {"stage": {"a": "1"}})
    assert not (tmp_path / "j").exists()
    with Journal(tmp_path / "j") as journal:
        journal.once("stage/it", lambda: 1)
    with Journal(tmp_path / "j") as journal:
        assert journal.kept("stage/it") == 1
        journal.remove()
    assert not (tmp_path / "j").exists()


def test_a_directory_of_something_else_is_left_alone(tmp_path) -> None:
    (tmp_path / "photo.jpg").write_text("dear")
    with pytest.raises(JournalError, match="is no journal"), Journal(tmp_path):
        pass
    with pytest.raises(CheckpointError, match="cannot be written"), Journal(tmp_path / "photo.jpg"):
        pass
    assert [one.name for one in tmp_path.iterdir()] == ["photo.jpg"]


def in_a_process(work) -> int:
    """Its id; it ends when the work does."""
    if (child := os.fork()) == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def test_a_second_process_is_told_who_is_at_it_and_a_killed_one_lets_go(tmp_path) -> None:
    def hold() -> None:
        with Journal(tmp_path / "j") as journal:
            journal.once("stage/it", lambda: 1)
            time.sleep(60)

    child = in_a_process(hold)
    until = time.monotonic() + 30
    while not list(tmp_path.glob("j/stage/*.entry")) and time.monotonic() < until:
        time.sleep(0.01)
    with (
        pytest.raises(JournalError, match=f"in use by process {child} on "),
        Journal(tmp_path / "j"),
    ):
        pass
    (tmp_path / "j" / HOLDER).unlink()  # it has only just begun
    with pytest.raises(JournalError, match="in use by another process"), Journal(tmp_path / "j"):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with Journal(tmp_path / "j") as journal:
        assert journal.kept("stage/it") == 1
        with pytest.raises(JournalError, match=f"process {os.getpid()}"), Journal(tmp_path / "j"):
            pass
    with Journal(tmp_path / "j") as journal:  # what is not held any more is free
        assert journal.kept("stage/it") == 1


def begun(path: Path, force: bool = False, **stages: dict[str, str]) -> Journal:
    journal = Journal(path)
    with journal:
        journal.begin(lambda: stages, force)
        for stage in stages:
            journal.once(f"{stage}/it", lambda: 1)
    return journal


def stages_of(path: Path) -> set[str]:
    return {one.name for one in path.iterdir() if one.is_dir()}


def test_a_journal_of_other_work_is_refused_in_words(tmp_path) -> None:
    path = tmp_path / "j"
    first, second = {"model": "a" * 64, "layers": "*"}, {"macs": "0.3"}
    begun(path, one=first, two=second)
    begun(path, one=first, two=second)
    with pytest.raises(JournalError, match=r"other work: macs was 0.3, is 0.2. Finish.*--force"):
        begun(path, one=first, two={"macs": "0.2"})
    with pytest.raises(JournalError, match=r"its model is another, params was not given, is 0\.5"):
        begun(path, one={**first, "model": "b" * 64, "params": "0.5"}, two=second)
    begun(path, one=first)  # a part of it disturbs nothing
    assert stages_of(path) == {"one", "two"}
    begun(path, True, one=first, two={"macs": "0.2"})
    begun(path, one=first, two={"macs": "0.2"})


def test_force_throws_away_no_more_than_it_must(tmp_path) -> None:
    path = tmp_path / "j"
    begun(path, one={"a": "1"}, two={}, three={"b": "1"})
    with Journal(path) as journal:
        journal.begin(lambda: {"one": {"a": "1"}, "two": {}, "three": {"b": "2"}}, force=True)
        assert [journal.kept(f"{s}/it") for s in ("one", "two", "three")] == [1, 1, None]
    with Journal(path) as journal:
        journal.begin(lambda: {"one": {"a": "2"}, "two": {}, "three": {"b": "2"}}, force=True)
        assert stages_of(path) == set()
        journal.once("one/it", lambda: 1)
    (path / "request.json").write_text("{")  # of nobody knows what
    with Journal(path) as journal:
        journal.begin(lambda: {"one": {"a": "2"}})
        assert journal.kept("one/it") is None


def test_a_full_disk_leaves_the_entry_before(tmp_path, monkeypatch) -> None:
    def full(tensors, path, about) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with Journal(tmp_path / "j") as journal:
        journal.once("stage/it", lambda: 1)
        monkeypatch.setattr(journals, "save_file", full)
        with pytest.raises(CheckpointError, match="cannot be written: No space left on device"):
            journal.once("stage/other", lambda: 2)
        monkeypatch.undo()
        assert journal.kept("stage/it") == 1 and journal.kept("stage/other") is None
        assert journal.once("stage/other", lambda: 2) == 2
    assert not list(tmp_path.rglob("*.new"))


def test_what_the_system_does_not_let_grow_is_an_error_and_no_entry(tmp_path) -> None:
    """As a full disk would be, without one."""

    def write() -> None:
        with Journal(tmp_path / "j") as journal:
            journal.once("stage/it", lambda: 1)
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
            try:
                journal.once("stage/large", lambda: torch.zeros(100_000))
            except CheckpointError as error:
                (tmp_path / "told").write_text(str(error))

    assert os.waitpid(in_a_process(write), 0)[1] == 0
    assert "cannot be written" in (tmp_path / "told").read_text()
    assert not list(tmp_path.rglob("*.new"))
    with Journal(tmp_path / "j") as journal:
        assert journal.kept("stage/it") == 1 and journal.kept("stage/large") is None


def test_a_full_disk_is_said_by_what_saves_too(tmp_path) -> None:
    model = make_model()
    analysis = rankfold.analyze(model, make_data(), metric="weight")
    small = rankfold.factorize(model, analysis.plan(params=0.6))

    def write() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000))
        for save in (
            lambda: rankfold.save(small, tmp_path / "small"),
            lambda: analysis.save(tmp_path / "analysis"),
        ):
            with pytest.raises(CheckpointError, match="cannot be written"):
                save()

    assert os.waitpid(in_a_process(write), 0)[1] == 0
    assert not (tmp_path / "small").exists() and not list(tmp_path.rglob("*.new"))


# Whole calls.


def make_model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 8)]
    return nn.Sequential(*layers).eval()


def make_data() -> list[torch.Tensor]:
    return list(torch.randn(64, 32, generator=torch.Generator().manual_seed(1)).split(4))


def compressed(journal: Path | None = None, **options) -> nn.Module:
    asked = {"params": 0.6, "epochs": 2, "methods": ["svd"], **options}
    return rankfold.compress(make_model(), make_data(), journal=journal, **asked)


def assert_same_network(first: nn.Module, second: nn.Module) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[n], theirs[n]) for n in ours)
    records = [rankfold.record_of(one) for one in (first, second)]
    assert records[0].plan == records[1].plan and records[0].outlook == records[1].outlook
    assert records[0].recovery.epochs == records[1].recovery.epochs


class Stopped(BaseException):
    """As a kill: nobody catches it."""


@pytest.fixture
def stopping(monkeypatch) -> list[str]:
    """Every call ends when it has written the first file that was not there; the files' names."""
    written: list[str] = []
    replace = journals.replace_file

    def replace_and_stop(path: Path, write) -> None:
        replace(path, write)
        if path.suffix == ".entry":
            written.append(f"{path.parent.name}/{path.stem}")
            raise Stopped

    monkeypatch.setattr(journals, "replace_file", replace_and_stop)
    return written


def until_done(work):
    while True:
        try:
            return work()
        except Stopped:
            pass


@pytest.mark.parametrize("options", [{}, {"params": None, "max_drop": 0.5}])
def test_stopped_after_every_entry_the_network_is_the_same(tmp_path, stopping, options) -> None:
    expected = compressed(**options)
    found = until_done(lambda: compressed(tmp_path / "j", **options))
    assert_same_network(found, expected)
    assert len(stopping) > 20
    # The training state is written again and again, everything else once.
    assert len(stopping) - len(set(stopping)) == stopping.count("network/training") - 1


def test_what_is_done_is_done_in_no_time_again(tmp_path, monkeypatch) -> None:
    first = compressed(tmp_path / "j")
    monkeypatch.setattr(sys.modules["rankfold.compress"], "analyze", None)
    again = compressed(tmp_path / "j")
    assert_same_network(first, again)
    assert rankfold.record_of(again).comparison == rankfold.record_of(first).comparison


def test_other_calls_on_a_journal_are_refused_and_force_keeps_the_analysis(
    tmp_path, monkeypatch
) -> None:
    path = tmp_path / "j"
    compressed(path)
    with pytest.raises(JournalError, match=r"params was 0.6, is 0.5"):
        compressed(path, params=0.5)
    with pytest.raises(JournalError, match="seed was not given, is 1"):
        compressed(path, seed=1)
    with pytest.raises(JournalError, match="its data is another"):
        rankfold.compress(
            make_model(), make_data()[1:], params=0.6, epochs=2, methods=["svd"], journal=path
        )
    other = make_model()
    with torch.no_grad():
        other[0].bias[0] += 1
    with pytest.raises(JournalError, match="its model is another"):
        rankfold.compress(other, make_data(), params=0.6, epochs=2, methods=["svd"], journal=path)
    expected = compressed(params=0.5)
    monkeypatch.setattr(sys.modules["rankfold.analysis.analyze"], "_analyze", None)
    assert_same_network(compressed(path, params=0.5, force=True), expected)


def test_pieces_have_journals_of_their_own(tmp_path, stopping) -> None:
    model, data = make_model(), make_data()
    expected = rankfold.analyze(model, data)
    found = until_done(lambda: rankfold.analyze(model, data, journal=tmp_path / "a"))
    plan = expected.plan(params=0.5)
    assert found.plan(params=0.5) == plan
    assert found.checks == expected.checks and found.trials == expected.trials
    small = until_done(lambda: rankfold.factorize(model, plan, journal=tmp_path / "f"))
    wanted = rankfold.factorize(model, plan).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in small.state_dict().items())
    with pytest.raises(JournalError, match="plan was"):
        rankfold.factorize(model, expected.plan(params=0.4), journal=tmp_path / "f")
    with pytest.raises(JournalError, match="metric was not given, is 'weight'"):
        rankfold.analyze(model, data, metric="weight", journal=tmp_path / "a")


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")]
)
def test_memory_that_runs_out_names_the_layer_and_the_others_are_kept(
    tmp_path, monkeypatch, error
) -> None:
    fitted: list[int] = []
    fit = LowRank.fit

    def fit_or_fail(method, layer, moments):
        if len(fitted) == 1:
            raise error
        fitted.append(layer.in_features)
        return fit(method, layer, moments)

    monkeypatch.setattr(LowRank, "fit", fit_or_fail)
    with pytest.raises(DeviceError, match="out of memory at layer '2', fitting svd"):
        compressed(tmp_path / "j")
    fitted.append(0)
    found = compressed(tmp_path / "j")
    assert fitted[:4] == [32, 0, 64, 48]  # the first layer's decomposition was there
    monkeypatch.undo()
    assert_same_network(found, compressed())


def test_errors_of_the_users_lose_nothing(tmp_path, monkeypatch) -> None:
    expected = compressed()

    class Failing(list):
        fails = False

        def __iter__(self):
            if self.fails:
                raise OSError("the share is gone")
            return super().__iter__()

        def __getitem__(self, place):
            if self.fails:
                raise OSError("the share is gone")
            return super().__getitem__(place)

    class Forward:
        calls = 0
        fails_at = None

        def __call__(self, model, batch):
            self.calls += 1
            if self.calls == self.fails_at:
                raise RuntimeError("a bug of the user's")
            return model(batch)

    model, forward = make_model(), Forward()
    asked = {"params": 0.6, "epochs": 2, "methods": ["svd"], "forward": forward}
    asked["journal"] = tmp_path / "j"
    rankfold.analyze(model, make_data(), methods=["svd"], forward=forward)
    needed, forward.calls = forward.calls, 0
    forward.fails_at = needed + 60  # in recovery
    with pytest.raises(ModelError, match="a bug of the user's"):
        rankfold.compress(model, make_data(), **asked)
    monkeypatch.setattr(sys.modules["rankfold.analysis.analyze"], "_analyze", None)
    forward.fails_at = None
    data = Failing(make_data())
    found = rankfold.compress(model, data, **asked)
    assert_same_network(found, expected)
    data.fails = True
    with pytest.raises((CalibrationError, OSError), match="the share is gone"):
        rankfold.compress(model, data, **asked)
    data.fails = False
    assert_same_network(rankfold.compress(model, data, **asked), expected)


def test_a_damaged_network_or_training_state_in_a_journal_is_made_again(tmp_path, stopping) -> None:
    path = tmp_path / "j"
    expected = compressed()
    while stopping.count("network/training") < 1:
        with pytest.raises(Stopped):
            compressed(path)
    for file in (path / "network/training.entry", path / "network/factorized/model.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    assert_same_network(until_done(lambda: compressed(path)), expected)
    assert stopping.count("network/training") == 3


def test_the_request_of_a_journal_is_for_people_to_read(tmp_path) -> None:
    compressed(tmp_path / "j")
    document = json.loads((tmp_path / "j" / "request.json").read_text())
    assert document["stages"]["network"]["params"] == "0.6"
    assert document["stages"]["analysis"]["methods"] == "'svd'"
    assert (tmp_path / "j" / LOCK).exists()
