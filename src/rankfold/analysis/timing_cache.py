"""Measured times on disk, shared by all runs on a machine.

An SQLite database in the user's cache directory: several processes can write to it at once. What
cannot be read is thrown away, since it can be measured again.
"""

import contextlib
import sqlite3
from dataclasses import dataclass, field
from pathlib import Path

from platformdirs import user_cache_path

_TABLE = "CREATE TABLE IF NOT EXISTS timings (key TEXT PRIMARY KEY, milliseconds REAL NOT NULL)"
_GET = "SELECT milliseconds FROM timings WHERE key = ?"
_PUT = "INSERT OR REPLACE INTO timings VALUES (?, ?)"
_WAIT = 10.0  # seconds for another process to finish writing


def default_path() -> Path:
    return user_cache_path("rankfold") / "timings.sqlite"


@dataclass(frozen=True)
class TimingCache:
    """Milliseconds by key. Without a path, or where none can be written, in memory alone."""

    path: Path | None = field(default_factory=default_path)
    _known: dict[str, float] = field(default_factory=dict)

    def get(self, key: str) -> float | None:
        if key not in self._known:
            row = self._run(_GET, (key,))
            if row is not None and isinstance(row[0], float) and row[0] > 0:
                self._known[key] = row[0]
        return self._known.get(key)

    def put(self, key: str, milliseconds: float) -> None:
        self._known[key] = milliseconds
        self._run(_PUT, (key, milliseconds))

    def _run(self, statement: str, values: tuple[object, ...]) -> tuple[object, ...] | None:
        """The first row of one statement; None also if the database cannot be used."""
        if self.path is None:
            return None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self.path, timeout=_WAIT)
            with contextlib.closing(connection) as database, database:
                database.execute(_TABLE)
                return database.execute(statement, values).fetchone()
        except sqlite3.OperationalError:
            return None  # locked for long, read-only, no room
        except sqlite3.DatabaseError:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)  # damaged
        except OSError:
            pass
        return None
