"""Writes a whole state file for the embedded engine from rows that come one after the other.

The file is made beside what is in use and nothing reads it before `finish`, which has it synced.
Used to restore a backup; one SQLite transaction, so a file that was not finished is empty.
"""

from __future__ import annotations

import os
import sqlite3
import zlib
from collections.abc import Sequence
from pathlib import Path

from manager.store.engine import Row
from manager.store.engines import state_file
from swarm import errors
from swarm.clock import Clock


class StateWriter:
    """One new file. All methods block, and are for one thread at a time."""

    def __init__(self, path: Path, clock: Clock) -> None:
        """Raises Unavailable when the disk refuses, Conflict when there is such a file."""
        if path.exists():
            raise errors.Conflict(f"{path} exists already; move it away first")
        self._path = path
        self._lock_fd = state_file.lock(path)
        self._db: sqlite3.Connection | None = None
        try:
            self._db = state_file.open_locked(path, clock)
            self._db.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            self.close()
            raise self._failed(error) from error
        except BaseException:
            self.close()
            raise

    def add(self, rows: Sequence[Row]) -> None:
        """Raises Unavailable (disk full), Invalid for a row that is there already."""
        db = self._db
        errors.invariant(db is not None, "rows for a state file that is closed")
        assert db is not None
        try:
            db.executemany(
                "INSERT INTO rows(tbl, id, version, value, crc) VALUES (?,?,?,?,?)",
                [(r.table, r.id, r.version, r.value, zlib.crc32(r.value, r.version)) for r in rows],
            )
        except sqlite3.IntegrityError:
            raise errors.Invalid(f"a row occurs twice among {_span(rows)}") from None
        except sqlite3.Error as error:
            raise self._failed(error) from error

    def finish(self, revision: int) -> None:
        """Makes the file whole, at this revision, and on the disk."""
        db = self._db
        assert db is not None
        try:
            db.execute("UPDATE facts SET value = ? WHERE name = 'revision'", (revision,))
            db.execute("COMMIT")
        except sqlite3.Error as error:
            raise self._failed(error) from error
        self.close()

    def close(self) -> None:
        """Lets go of the file; without `finish` it holds nothing. May be repeated."""
        if self._db is not None:
            try:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
            finally:
                self._db.close()
                self._db = None
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def _failed(self, error: sqlite3.Error) -> errors.Unavailable:
        return errors.Unavailable(
            f"{self._path} cannot be written: {error}; nothing was changed. See that its disk "
            "has room and works"
        )


def _span(rows: Sequence[Row]) -> str:
    return f"{len(rows)} rows from {rows[0].table}/{rows[0].id} on" if rows else "no rows"
