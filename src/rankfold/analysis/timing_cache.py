"""Measured times on disk, shared by all runs on a machine.

An SQLite database in the user's cache directory: several processes can write to it at once. What
cannot be read, or was written in another way, is thrown away, since it can be measured again.
"""

import contextlib
import math
import sqlite3
from dataclasses import dataclass, field
from pathlib import Path

from platformdirs import user_cache_path

_VERSION = 2  # of the table and of how times are taken: others are thrown away
_TABLE = "CREATE TABLE IF NOT EXISTS timings (key TEXT PRIMARY KEY, time REAL NOT NULL)"
_GET = "SELECT time FROM timings WHERE key = ?"
_PUT = "INSERT OR REPLACE INTO timings VALUES (?, ?)"
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_WAIT = 10.0  # seconds for another process to finish writing


def default_path() -> Path:
    return user_cache_path("rankfold") / "timings.sqlite"


@dataclass(frozen=True)
class TimingCache:
    """Times, or ratios of times, by key.

    Without a path, or where none can be written, in memory alone.
    """

    path: Path | None = field(default_factory=default_path)
    _known: dict[str, float] = field(default_factory=dict)

    def get(self, key: str) -> float | None:
        if key not in self._known:
            row = self._run(_GET, (key,))
            if row is not None and isinstance(row[0], float) and 0 < row[0] < math.inf:
                self._known[key] = row[0]
        return self._known.get(key)

    def put(self, key: str, time: float) -> None:
        self._known[key] = time
        self._run(_PUT, (key, time))

    def _run(self, statement: str, values: tuple[object, ...]) -> tuple[object, ...] | None:
        """The first row of one statement; None also if the database cannot be used."""
        if self.path is None:
            return None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self.path, timeout=_WAIT)
            with contextlib.closing(connection) as database, database:
                _make_ready(database)
                return database.execute(statement, values).fetchone()
        except sqlite3.DatabaseError as error:
            # Locked for long, read-only, no room, no time at all: done without. The main code of an
            # error is its last byte.
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED:
                self._throw_away()
        except UnicodeDecodeError:  # of what SQLite says of a damaged schema, which it quotes
            self._throw_away()
        except OSError:
            pass
        return None

    def _throw_away(self) -> None:
        """The database, and what was half written to it, which would be taken for the next one's.

        In this order: where the second cannot be removed, the first is there to be seen as damaged.
        """
        assert self.path is not None
        for ending in ("-journal", "-wal", "-shm", ""):
            with contextlib.suppress(OSError):
                self.path.with_name(self.path.name + ending).unlink(missing_ok=True)


def _make_ready(database: sqlite3.Connection) -> None:
    """A table of this version, empty if there was another."""
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version != _VERSION:
        database.execute("BEGIN IMMEDIATE")
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version != _VERSION:  # and nobody was faster
            database.execute("DROP TABLE IF EXISTS timings")
            database.execute(f"PRAGMA user_version = {_VERSION}")
    database.execute(_TABLE)
