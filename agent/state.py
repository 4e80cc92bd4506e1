"""What the node remembers of its tasks across a restart of the agent: one SQLite file.

Owns the file's format. Each task's assignment and last status are kept, never the data of secrets
(assignments do not carry it; registry credentials are cut out). The file is a memory, not the
truth: what runs is told by the runtimes, what should run by the manager. So writes are batched and
survive the death of the agent (WAL) but may lose the last moments at a power cut
(synchronous=NORMAL), and a damaged file is set aside: the worker then starts empty and finds its
tasks again in the runtimes, whose names carry the task ids. On a full disk what is to be written
waits in memory, the latest of each task, until there is room; `lack` says so meanwhile.
"""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar

import structlog
from google.protobuf.message import DecodeError
from msgspec import structs

from agent.disks import measure
from agent.runtime.base import DISK_FULL, cause_of
from agent.runtime.memory import memory_folder
from swarm import errors
from swarm.v1 import Assignment, TaskStatus, decode, encode

log = structlog.get_logger("state")

P = ParamSpec("P")
R = TypeVar("R")

FORMAT = 1
FILE = "tasks.db"
RETRY_S = 1.0
# A file system with less is taken for full where SQLite only speaks of an error.
ROOM_BYTES = 1024 * 1024
_SCHEMA = """
CREATE TABLE meta (format INTEGER NOT NULL);
CREATE TABLE tasks (
    id TEXT PRIMARY KEY, assignment BLOB NOT NULL, status BLOB NOT NULL
) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Record:
    """One task as remembered."""

    assignment: Assignment
    status: TaskStatus

    @property
    def task_id(self) -> str:
        task = self.assignment.task
        assert task is not None
        return task.id


class StateFile:
    """The records of one node. `open` first; writes are taken at once and done in order in a
    thread.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._db: sqlite3.Connection | None = None
        # One thread: SQLite's connection is used by it alone, and batches keep their order.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="agent-state")
        self._puts: dict[str, Record | None] = {}
        self._dirty = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        # Why the earlier records are not here; empty: they are.
        self.problem = ""
        # Why records cannot be written just now; empty: they can.
        self.lack = ""
        # Called when `lack` has changed.
        self.on_change: Callable[[], None] = lambda: None

    async def open(self) -> tuple[Record, ...]:
        """Reads all records. A damaged file is set aside with an error in the log and in `problem`.
        On a full disk a copy in memory is read.

        Raises Invalid for a file of a newer format, Unavailable when the folder cannot be written.
        """
        return await self._in_thread(self._open)

    def _open(self) -> tuple[Record, ...]:
        try:
            return self._attach()
        except (sqlite3.OperationalError, OSError) as error:
            if _no_room(self._path, error):
                self._close()
                self._note(error)
                return self._read_copy()
            raise errors.Unavailable(
                f"{self._path} cannot be opened: {error}; see that the folder can be written and "
                "the disk has room"
            ) from None

    def _attach(self) -> tuple[Record, ...]:
        """Opens the file, or a new one in the place of one that is damaged."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            return self._read()
        except (sqlite3.DatabaseError, DecodeError, UnicodeDecodeError) as error:
            if not _is_damage(error):
                raise
            self._set_aside(str(error))
            return self._read()

    def _read_copy(self) -> tuple[Record, ...]:
        """What the file holds, read elsewhere, for SQLite cannot even read without writing. Without
        any records it goes on as after a damage.
        """
        root = memory_folder("records")
        try:
            if root is not None:
                root.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root) as folder:
                for name in (FILE, f"{FILE}-wal"):
                    if (source := self._path.with_name(name)).exists():
                        shutil.copyfile(source, Path(folder, name))
                copy = StateFile(Path(folder))
                try:
                    return copy._read()
                finally:
                    copy._close()
                    copy._thread.shutdown()
        except (sqlite3.Error, DecodeError, UnicodeDecodeError, OSError) as error:
            log.error("task_records_not_read", path=str(self._path), reason=str(error))
            return ()

    def _read(self) -> tuple[Record, ...]:
        db = self._db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        self._path.chmod(0o600)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=NORMAL")
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
        if not tables:
            db.executescript(f"BEGIN IMMEDIATE;{_SCHEMA}INSERT INTO meta VALUES ({FORMAT});COMMIT;")
            return ()
        if "meta" not in tables:
            raise sqlite3.DatabaseError("it holds no format")
        (found,) = db.execute("SELECT format FROM meta").fetchone() or (0,)
        if found > FORMAT:
            db.close()
            raise errors.Invalid(
                f"{self._path} has format {found}, this version reads up to {FORMAT}; run the "
                "swarmd that wrote it, or a newer one"
            )
        (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)
        rows = db.execute("SELECT assignment, status FROM tasks ORDER BY id").fetchall()
        records = tuple(Record(decode(Assignment, a), decode(TaskStatus, s)) for a, s in rows)
        if any(r.assignment.task is None for r in records):
            raise sqlite3.DatabaseError("a record names no task")
        return records

    def _set_aside(self, reason: str) -> None:
        """Keeps the damaged file for people to look at, and makes room for a new one."""
        if self._db is not None:
            self._db.close()
        number = 1
        while (aside := self._path.with_name(f"{FILE}.damaged-{number}")).exists():
            number += 1
        self._path.rename(aside)
        for suffix in ("-wal", "-shm"):  # they belong to the damaged file
            self._path.with_name(FILE + suffix).unlink(missing_ok=True)
        self.problem = (
            f"{self._path} was damaged ({reason}) and is now {aside}; started without records, "
            "tasks are found again in the runtimes and handed back by the manager"
        )
        log.error("task_records_damaged", path=str(self._path), moved_to=str(aside), reason=reason)

    # -------------------------------------------------------------- writing

    def put(self, record: Record) -> None:
        """Remembers a task; written soon."""
        self._puts[record.task_id] = record
        self._mark()

    def drop(self, task_id: str) -> None:
        """Forgets a task; written soon."""
        self._puts[task_id] = None
        self._mark()

    def _mark(self) -> None:
        self._dirty.set()
        self._idle.clear()

    async def run(self) -> None:
        """Writes what is put, in batches, until cancelled. A write that does not work is tried
        again each second.
        """
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            batch, self._puts = self._puts, {}
            try:
                await self._in_thread(self._write, batch)
            except (sqlite3.Error, DecodeError, UnicodeDecodeError, OSError) as error:
                if self._note(error):
                    self.on_change()
                self._puts = batch | self._puts
                await asyncio.sleep(RETRY_S)
                self._dirty.set()
            else:
                if self.lack:
                    log.info("task_records_written_again", path=str(self._path))
                    self.lack = ""
                    self.on_change()
            if not self._puts:
                self._idle.set()

    def _note(self, error: Exception) -> bool:
        """Says why nothing can be written; whether that is news."""
        before = self.lack
        self.lack = (
            f"the records of this node's tasks cannot be written to {self._path}: {error}; free "
            "some space on its disk. The agent goes on without"
        )
        if self.lack != before:
            log.error("task_records_not_written", path=str(self._path), reason=str(error))
        return self.lack != before

    async def flushed(self) -> None:
        """Waits until all that was put is in the file; `run` must be running."""
        await self._idle.wait()

    async def close(self) -> None:
        """Writes what is left and closes the file."""
        batch, self._puts = self._puts, {}
        try:
            await self._in_thread(self._write, batch)
        except sqlite3.Error as error:
            log.error("task_records_not_written", path=str(self._path), reason=str(error))
        await self._in_thread(self._close)
        self._thread.shutdown()

    def _close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    def _write(self, batch: Mapping[str, Record | None]) -> None:
        if self._db is None and self.lack:
            self._attach()
        db = self._db
        if db is None:
            return
        puts = [
            (id_, encode(_without_credentials(r.assignment)), encode(r.status))
            for id_, r in batch.items()
            if r is not None
        ]
        drops = [(id_,) for id_, r in batch.items() if r is None]
        db.execute("BEGIN IMMEDIATE")
        try:
            db.executemany("INSERT OR REPLACE INTO tasks VALUES (?, ?, ?)", puts)
            db.executemany("DELETE FROM tasks WHERE id = ?", drops)
            db.execute("COMMIT")
        except sqlite3.Error:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise

    async def _in_thread(self, fn: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, partial(fn, *args, **kwargs))


def _no_room(path: Path, error: Exception) -> bool:
    """Whether an error comes from a full file system; SQLite does not always call it so."""
    if isinstance(error, sqlite3.Error) and error.sqlite_errorname == "SQLITE_FULL":
        return True
    if isinstance(error, OSError):
        return cause_of(error) == DISK_FULL
    folder = next(p for p in path.parents if p.exists())
    room = measure(folder)
    return room is not None and (
        room.free_bytes < ROOM_BYTES or (room.inodes_total > 0 and room.inodes_free == 0)
    )


# What the disk or another process does, and not the file's content. A short read is content.
_NOT_DAMAGE = ("CANTOPEN", "READONLY", "FULL", "BUSY", "LOCKED", "PERM", "IOERR", "NOMEM")


def _is_damage(error: Exception) -> bool:
    if not isinstance(error, sqlite3.OperationalError):
        return True
    name = error.sqlite_errorname.removeprefix("SQLITE_")
    return name == "IOERR_SHORT_READ" or not name.startswith(_NOT_DAMAGE)


def _without_credentials(assignment: Assignment) -> Assignment:
    if not assignment.registry_auth:
        return assignment
    return structs.replace(assignment, registry_auth="")
