import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rankfold.analysis import timing_cache
from rankfold.analysis.timing_cache import TimingCache, default_path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "timings.sqlite"


def test_what_was_put_is_found_by_others_later(path: Path) -> None:
    TimingCache(path).put("a", 1.5)
    TimingCache(path).put("b", 2.0)
    again = TimingCache(path)
    assert again.get("a") == 1.5 and again.get("b") == 2 and again.get("c") is None


def test_the_last_value_counts(path: Path) -> None:
    cache = TimingCache(path)
    cache.put("a", 1.5)
    cache.put("a", 2.5)
    assert cache.get("a") == TimingCache(path).get("a") == 2.5


def test_keys_are_any_text(path: Path) -> None:
    keys = ["", "it's", '"; DROP TABLE timings; --', "Conv2d(3, 8)\n×", "Conv2d(3, 80)"]
    for number, key in enumerate(keys, 1):
        TimingCache(path).put(key, number)
    assert [TimingCache(path).get(key) for key in keys] == [1, 2, 3, 4, 5]


def test_without_a_path_it_is_memory_alone(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    cache = TimingCache(None)
    cache.put("a", 1.5)
    assert cache.get("a") == 1.5 and cache.get("b") is None
    assert TimingCache(None).get("a") is None
    assert not list(tmp_path.iterdir())


def test_by_default_it_lies_in_the_users_cache(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(timing_cache, "user_cache_path", lambda name: tmp_path / name)
    assert TimingCache().path == default_path() == tmp_path / "rankfold" / "timings.sqlite"
    TimingCache().put("a", 1.5)
    assert TimingCache().get("a") == 1.5


@pytest.mark.parametrize(
    "damage", [b"not a database " * 100, b"SQLite format 3\0" + b"\xff" * 4096]
)
def test_a_damaged_file_is_replaced(path: Path, damage: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(damage)
    cache = TimingCache(path)
    assert cache.get("a") is None
    cache.put("a", 1.5)
    assert TimingCache(path).get("a") == 1.5


def test_a_file_that_is_cut_off_is_replaced(path: Path) -> None:
    TimingCache(path).put("first", 1.0)
    rows = [(f"a long key to fill some pages, {number}", number) for number in range(1, 200)]
    with sqlite3.connect(path) as database:
        database.executemany("INSERT INTO timings VALUES (?, ?)", rows)
    database.close()
    path.write_bytes(path.read_bytes()[:5000])
    again = TimingCache(path)
    again.get("a")
    again.put("a", 1.5)
    assert again.get("a") == 1.5
    third = TimingCache(path)
    third.put("b", 2.5)
    assert TimingCache(path).get("b") == 2.5


@pytest.mark.parametrize(
    "older",
    [
        "CREATE TABLE timings (key TEXT PRIMARY KEY, seconds REAL, device TEXT NOT NULL)",
        "CREATE TABLE timings (key TEXT PRIMARY KEY, milliseconds REAL NOT NULL)",
        "CREATE TABLE other (key TEXT)",
    ],
)
def test_what_another_version_wrote_is_not_believed(path: Path, older: str) -> None:
    path.parent.mkdir()
    database = sqlite3.connect(path)
    with database:
        database.execute(older)
        if "milliseconds" in older:
            database.execute("INSERT INTO timings VALUES ('a', 7.0)")
        database.execute(f"PRAGMA user_version = {timing_cache._VERSION + 1}")
    database.close()
    assert TimingCache(path).get("a") is None
    TimingCache(path).put("a", 1.5)
    assert TimingCache(path).get("a") == 1.5


def test_no_time_at_all_costs_nobody_the_others(path: Path) -> None:
    TimingCache(path).put("good", 1.5)
    for bad in (math.nan, math.inf, -math.inf):
        TimingCache(path).put("bad", bad)
        assert TimingCache(path).get("bad") is None
    assert TimingCache(path).get("good") == 1.5


def test_what_a_killed_process_left_half_written_goes_with_a_damaged_file(path: Path) -> None:
    """A journal beside a new database would be played back into it."""
    path.parent.mkdir()
    path.write_bytes(b"not a database " * 100)
    left = path.with_name(path.name + "-journal")
    left.write_bytes(b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7" + b"\1" * 2000)
    TimingCache(path).put("a", 1.5)
    assert not left.exists()
    cache = TimingCache(path)
    cache.put("a", 1.5)
    assert TimingCache(path).get("a") == 1.5


def test_values_that_are_no_times_are_not_believed(path: Path) -> None:
    TimingCache(path).put("good", 1.5)
    with sqlite3.connect(path) as database:
        rows = [
            ("zero", 0.0),
            ("endless", math.inf),
            ("negative", -1.0),
            ("text", "soon"),
            ("blob", b"1"),
        ]
        database.executemany("INSERT INTO timings VALUES (?, ?)", rows)
    database.close()
    cache = TimingCache(path)
    assert [cache.get(key) for key in ("zero", "endless", "negative", "text", "blob")] == [None] * 5
    assert cache.get("good") == 1.5


def test_a_path_that_cannot_be_written_is_memory_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path, tmp_path / "file" / "timings.sqlite", Path("/proc/no/timings.sqlite")):
        cache = TimingCache(path)
        assert cache.get("a") is None
        cache.put("a", 1.5)
        assert cache.get("a") == 1.5
        assert TimingCache(path).get("a") is None
    assert (tmp_path / "file").read_text() == "kept"


def test_a_database_that_can_only_be_read_is_read(path: Path, monkeypatch) -> None:
    TimingCache(path).put("a", 1.5)
    connect = sqlite3.connect

    def read_only(path: Path, timeout: float) -> sqlite3.Connection:
        return connect(f"file:{path}?mode=ro", timeout=timeout, uri=True)

    monkeypatch.setattr(timing_cache.sqlite3, "connect", read_only)
    cache = TimingCache(path)
    assert cache.get("a") == 1.5
    cache.put("b", 2.5)
    assert cache.get("b") == 2.5 and TimingCache(path).get("b") is None
    assert path.exists()


def test_a_damaged_file_that_cannot_be_removed_is_memory_alone(path: Path, monkeypatch) -> None:
    path.parent.mkdir()
    path.write_bytes(b"not a database " * 100)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(Path, "unlink", refuse)
    cache = TimingCache(path)
    assert cache.get("a") is None
    cache.put("a", 1.5)
    assert cache.get("a") == 1.5


def test_a_database_that_is_locked_for_long_is_done_without(path: Path, monkeypatch) -> None:
    monkeypatch.setattr(timing_cache, "_WAIT", 0.05)
    TimingCache(path).put("a", 1.5)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    cache = TimingCache(path)
    assert cache.get("a") is None
    cache.put("b", 2.5)
    assert cache.get("b") == 2.5
    other.execute("ROLLBACK")
    other.close()
    assert cache.get("a") == 1.5 and TimingCache(path).get("b") is None


# Without torch, whose import would be most of the test.
WRITER = """
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("timing_cache", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["timing_cache"] = module
spec.loader.exec_module(module)
cache = module.TimingCache(pathlib.Path(sys.argv[2]))
print("ready", flush=True)
sys.stdin.readline()
for number in range(1, 16):
    cache.put(f"{sys.argv[3]} {number}", number)
    cache.put("shared", number)
"""


def test_two_processes_may_write_at_once(path: Path) -> None:
    code = [sys.executable, "-c", WRITER, str(timing_cache.__file__), str(path)]
    writers = [
        subprocess.Popen([*code, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in ("first", "second")
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=60)
        assert writer.returncode == 0
    cache = TimingCache(path)
    for name in ("first", "second"):
        assert [cache.get(f"{name} {n}") for n in range(1, 16)] == list(range(1, 16))
    assert cache.get("shared") == 15


def writers(path: Path, count: int, work) -> list[int]:
    """Processes that run `work(cache, number)`."""
    found = []
    for number in range(count):
        if (child := os.fork()) == 0:
            status = 1
            try:
                work(TimingCache(path), number)
                status = 0
            finally:
                os._exit(status)
        found.append(child)
    return found


def test_many_processes_write_and_read_at_once(path: Path) -> None:
    def work(cache: TimingCache, number: int) -> None:
        for step in range(1, 11):
            cache.put(f"{number} {step}", step)
            assert TimingCache(path).get(f"{number} {step}") == step

    for child in writers(path, 6, work):
        assert os.waitpid(child, 0)[1] == 0
    cache = TimingCache(path)
    found = [cache.get(f"{n} {step}") for n in range(6) for step in range(1, 11)]
    assert found == [*range(1, 11)] * 6


def test_killed_writers_leave_a_database(path: Path) -> None:
    def work(cache: TimingCache, number: int) -> None:
        for step in range(1, 100_000):
            cache.put(f"{number} {step}", step)

    TimingCache(path).put("before", 1.5)
    for delay in (0.01, 0.02, 0.03, 0.05, 0.08):
        children = writers(path, 2, work)
        time.sleep(delay)
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        TimingCache(path).put(f"after {delay}", delay)
        assert TimingCache(path).get("before") == 1.5
        assert TimingCache(path).get(f"after {delay}") == delay


def test_processes_that_find_a_damaged_file_agree_on_a_new_one(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"not a database " * 100)

    def work(cache: TimingCache, number: int) -> None:
        for step in range(1, 6):
            cache.put(f"{number} {step}", step)

    for child in writers(path, 4, work):
        assert os.waitpid(child, 0)[1] == 0
    TimingCache(path).put("a", 1.5)
    assert TimingCache(path).get("a") == 1.5


def test_a_damaged_schema_that_is_no_text_is_thrown_away(path: Path) -> None:
    TimingCache(path).put("a", 1.5)
    data = path.read_bytes()
    assert b"(key TEXT" in data
    path.write_bytes(data.replace(b"(key TEXT", b"\xb6\x8b( TEXT"))
    assert TimingCache(path).get("a") is None
    TimingCache(path).put("a", 2.5)
    assert TimingCache(path).get("a") == 2.5
