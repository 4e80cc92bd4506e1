"""The log of a single manager: one SQLite file.

It owns the file, a writer thread and the order of commits. Rows are opaque here. A commit is
answered when it is on the disk: WAL with synchronous=FULL, which is one fsync for each SQLite
transaction. Each transaction takes every commit that has queued up meanwhile (group commit; DeWitt
et al., "Implementation Techniques for Main Memory Database Systems", SIGMOD 1984, section 5), so
that concurrent writers share an fsync. Preconditions are judged by the writer thread against
versions it keeps in memory, in queue order: a commit sees those before it in the same group.

Invariants: `_versions` holds the version of each row in the file, and nothing else; a group is
written whole or not at all; commits are reported on the event loop in the order of their revisions;
one process has the file at a time (flock on `<file>.lock`, freed by the kernel when it dies).

Departure from the usual one-row-per-statement: a group's rows go in statements of many rows, for
sqlite3 gives up the interpreter's lock at each step of a statement and, while the event loop is
busy, waits up to 5 ms to get it back; a thousand steps would take seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import queue
import sqlite3
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import structlog

from manager.store.engine import Corrupt, Deposed, Fence, OnCommit, Op, Row, Stale
from swarm import errors, files
from swarm.clock import Clock

log = structlog.get_logger("store.embedded")

APPLICATION_ID: Final = 0x5357524D  # "SWRM", in the file's header
FORMAT: Final = 1  # in the header's user_version; a file of a later format is refused
GROUP_OPS_MAX: Final = 20_000  # one transaction's, so that no writer waits for seconds
QUEUE_COMMITS_MAX: Final = 20_000  # beyond it commits are refused as Unavailable
STATEMENT_ROWS: Final = 2_000  # of 5 parameters each; SQLite takes 32,766 parameters
CHECKPOINT_PAGES: Final = 4_000  # 16 MB of WAL, folded into the file in some 50 ms
WAL_BYTES_MAX: Final = 64 << 20  # what a checkpoint leaves of a WAL that grew larger
CACHE_KIB: Final = 32 << 10
LOAD_ROWS: Final = 500
CLOSE_S: Final = 30.0

_SCHEMA: Final = f"""
CREATE TABLE facts(name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE rows(tbl INTEGER NOT NULL, id TEXT NOT NULL, version INTEGER NOT NULL,
  value BLOB NOT NULL, crc INTEGER NOT NULL, PRIMARY KEY(tbl, id));
INSERT INTO facts VALUES('revision', 0), ('epoch', 0);
PRAGMA application_id={APPLICATION_ID};
PRAGMA user_version={FORMAT};
"""
_MAGIC: Final = b"SQLite format 3\0"
_HEADER_BYTES: Final = 100
# A write or fsync of the WAL that failed in a way that leaves open what the disk holds.
_UNKNOWN_OUTCOME: Final = frozenset((sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_DIR_FSYNC))

Versions = dict[tuple[int, str], int]


class _Commit(NamedTuple):
    ops: Sequence[Op]
    requires: Sequence[Op]
    fence: Fence | None
    done: asyncio.Future[int]


class _Call(NamedTuple):
    """Something else to be done between groups, on the writer thread."""

    run: Callable[[], Any]
    done: asyncio.Future[Any]


class EmbeddedEngine:
    """One manager's log in one file. See Engine for what its methods promise."""

    name = "embedded"

    def __init__(self, path: Path, clock: Clock) -> None:
        self.where = str(path)
        self._path = path
        self._clock = clock
        self._lock_fd = -1
        self._db: sqlite3.Connection | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._queue: queue.SimpleQueue[_Commit | _Call | None] = queue.SimpleQueue()
        self._queued = 0  # commits not yet answered; of the event loop
        self._writer: threading.Thread | None = None
        self._on_commit: OnCommit | None = None
        self._closing = False
        self._broken: errors.SwarmError | None = None  # why nothing more is written
        # Of the writer thread, once it runs.
        self._versions: Versions = {}
        self._revision = 0
        self._fence: Fence | None = None
        self._deposed = asyncio.Event()

    # -------------------------------------------------------------- opening

    async def load(self) -> tuple[int, Iterable[Row]]:
        """Opens or creates the file; the rows are read as they are iterated.

        A file that was not closed in order is checked first (PRAGMA quick_check: about 1 s for each
        GB). Raises Corrupt, and Unavailable when another process has the file or the disk refuses.
        """
        errors.invariant(self._db is None, "load of an engine that is open")
        try:
            await asyncio.to_thread(self._open)
        except BaseException:
            self._release()
            raise
        return self._revision, self._rows()

    def _open(self) -> None:
        try:
            self._lock()
            if not self._path.exists():
                _create(self._path)
            _check_header(self._path)
            unclean = _size(_beside(self._path, "-wal")) > 0
            self._db = db = _connect(self._path)
            self._check_format(db)
            if unclean:
                self._check_pages(db)
            facts = dict(db.execute("SELECT name, value FROM facts"))
            self._revision = facts["revision"]
        except OSError as error:
            raise errors.Unavailable(
                f"state file {self._path} cannot be opened: {error.strerror}; make the folder "
                "writable for swarmd, or choose another with --state-dir"
            ) from error
        except sqlite3.Error as error:
            raise self._reading_failed(error) from error
        except KeyError as error:
            raise _damaged(self._path, f"the fact {error} is missing") from error

    def _lock(self) -> None:
        """Takes the file for this process. Not a lock on the file itself: the kernel drops those
        of POSIX when the process closes any descriptor of it.
        """
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = _beside(self._path, ".lock")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(fd, 32).decode(errors="replace").strip() or "unknown"
            os.close(fd)
            raise errors.Unavailable(
                f"state file {self._path} is in use by process {owner}; stop that swarmd, or "
                "choose another folder with --state-dir"
            ) from error
        self._lock_fd = fd
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)

    def _check_format(self, db: sqlite3.Connection) -> None:
        (application,) = db.execute("PRAGMA application_id").fetchone()
        (found,) = db.execute("PRAGMA user_version").fetchone()
        if application != APPLICATION_ID:
            raise Corrupt(
                f"{self._path} is a SQLite file of another program (application id "
                f"{application:#x}); move it away, or choose another folder with --state-dir"
            )
        if found > FORMAT:
            raise Corrupt(
                f"state file {self._path} has format {found}, and this version reads formats up to "
                f"{FORMAT}; start the version that wrote it, or a later one"
            )

    def _check_pages(self, db: sqlite3.Connection) -> None:
        started_s = self._clock.monotonic_s()
        problems = [text for (text,) in db.execute("PRAGMA quick_check(5)") if text != "ok"]
        log.info(
            "state_checked_after_unclean_stop",
            file=self.where,
            bytes=_size(self._path),
            seconds=round(self._clock.monotonic_s() - started_s, 3),
        )
        if problems:
            raise _damaged(self._path, "; ".join(problems))

    def _rows(self) -> Iterator[Row]:
        """All rows, by table and id; fills in the versions on the way."""
        db = self._db
        errors.invariant(db is not None, "rows of an engine that is closed")
        assert db is not None
        versions = self._versions
        try:
            cursor = db.execute("SELECT tbl, id, version, value, crc FROM rows ORDER BY tbl, id")
            while chunk := cursor.fetchmany(LOAD_ROWS):
                for table, id_, version, value, crc in chunk:
                    if zlib.crc32(value, version) != crc:
                        raise _damaged(
                            self._path, f"row {id_!r} of table {table} is not as written"
                        )
                    versions[table, id_] = version
                    yield Row(table, id_, version, value)
        except sqlite3.Error as error:
            raise self._reading_failed(error) from error

    def _reading_failed(self, error: sqlite3.Error) -> errors.SwarmError:
        if _is_damage(error):
            return _damaged(self._path, str(error))
        return errors.Unavailable(
            f"state file {self._path} cannot be read: {error}; see whether the disk is full or "
            "failing"
        )

    def start(self, on_commit: OnCommit) -> None:
        """Begins to write and to report."""
        errors.invariant(self._db is not None and self._writer is None, "start before load")
        self._on_commit = on_commit
        self._loop = asyncio.get_running_loop()
        self._writer = threading.Thread(target=self._write_groups, name="store", daemon=True)
        self._writer.start()

    # -------------------------------------------------------------- the event loop's side

    async def commit(self, ops: Sequence[Op], requires: Sequence[Op], fence: Fence | None) -> int:
        """See Engine. Waits for one fsync, or two when a group is being written already."""
        self._check_open()
        assert self._loop is not None
        if self._queued >= QUEUE_COMMITS_MAX:
            raise errors.Unavailable(
                f"{self._queued} commits wait for the disk of {self._path}, the most that may; "
                "try again later"
            )
        done: asyncio.Future[int] = self._loop.create_future()
        self._queued += 1
        self._queue.put(_Commit(ops, requires, fence, done))
        return await done

    def _check_open(self) -> None:
        if self._broken is not None:
            raise _again(self._broken)
        if self._writer is None or self._closing:
            raise errors.Unavailable(f"state file {self._path} is closed; try again later")

    def _deliver(self, results: Sequence[tuple[_Commit, int | errors.SwarmError, int]]) -> None:
        """Reports a group: first every commit in order, then to each of its writers."""
        assert self._on_commit is not None
        self._queued -= len(results)
        for commit, result, time_ns in results:
            if isinstance(result, int):
                try:
                    self._on_commit(result, time_ns, commit.ops)
                except BaseException:
                    # The tables are behind the log for good: nothing may be built on them.
                    self._broken = errors.Internal(
                        f"revision {result} of {self._path} could not be applied; restart swarmd"
                    )
                    for other, _, _ in results:
                        _finish(other.done, _again(self._broken))
                    raise
        for commit, result, _ in results:
            _finish(commit.done, result)

    async def _on_writer(self, run: Callable[[], Any]) -> Any:
        self._check_open()
        assert self._loop is not None
        done: asyncio.Future[Any] = self._loop.create_future()
        self._queue.put(_Call(run, done))
        return await done

    async def campaign(self, node_id: str) -> Fence:
        """Leads at once, there being no other manager; an earlier leadership of this process ends.

        The epoch is on the disk before this returns, so no two leaderships share one.
        """
        fence: Fence = await self._on_writer(lambda: self._lead(node_id))
        return fence

    async def resign(self, fence: Fence) -> None:
        """Ends this leadership, if it is the present one."""
        if not self._closing:
            await self._on_writer(lambda: self._step_down(fence))

    async def wait_deposed(self, fence: Fence) -> None:
        """Returns when another campaign, `resign` or `close` has ended this leadership."""
        while self._fence == fence and not self._closing:
            await self._deposed.wait()

    async def close(self) -> None:
        """Finishes the commits already made, folds the WAL into the file and frees it."""
        if self._closing:
            return
        self._closing = True
        self._depose()
        try:
            if self._writer is not None:
                self._queue.put(None)
                await asyncio.to_thread(self._writer.join, CLOSE_S)
        finally:
            self._release()

    def _depose(self) -> None:
        """Wakes those who wait for the end of a leadership; on the event loop."""
        self._deposed.set()
        self._deposed = asyncio.Event()

    def _release(self) -> None:
        if self._db is not None and (self._writer is None or not self._writer.is_alive()):
            with contextlib.suppress(sqlite3.Error):  # then the next opening finds a WAL
                self._db.close()
            self._db = None
        if self._lock_fd >= 0 and self._db is None:
            os.close(self._lock_fd)
            self._lock_fd = -1

    # -------------------------------------------------------------- the writer thread's side

    def _write_groups(self) -> None:
        assert self._loop is not None
        open_ = True
        while open_:
            group: list[_Commit] = []
            calls: list[_Call] = []
            size = 0
            item = self._queue.get()
            while True:
                match item:
                    case _Commit():
                        group.append(item)
                        size += len(item.ops)
                    case _Call():
                        calls.append(item)
                    case None:
                        open_ = False
                if calls or not open_ or size >= GROUP_OPS_MAX:
                    break
                try:
                    item = self._queue.get_nowait()
                except queue.Empty:
                    break
            if group:
                self._tell(self._deliver, self._write(group))
            for call in calls:
                result = _outcome(call.run)
                self._tell(_finish, call.done, result)

    def _tell(self, fn: Callable[..., None], *args: Any) -> None:
        """Runs it on the event loop; when that is gone, nobody waits for the answer."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(fn, *args)

    def _write(
        self, group: Sequence[_Commit]
    ) -> list[tuple[_Commit, int | errors.SwarmError, int]]:
        """Judges and writes one group; for each commit its revision or its error, and the time."""
        time_ns = self._clock.now_ns()
        after: Versions = {}
        puts: dict[tuple[int, str], tuple[int, str, int, bytes, int]] = {}
        deletes: dict[tuple[int, str], None] = {}
        results: list[tuple[_Commit, int | errors.SwarmError, int]] = []
        revision = self._revision
        for commit in group:
            problem = self._problem(commit, after)
            if problem is not None:
                results.append((commit, problem, time_ns))
                continue
            revision += 1
            for op in commit.ops:
                key = (op.table, op.id)
                if op.value is None:
                    after[key] = 0
                    puts.pop(key, None)
                    deletes[key] = None
                else:
                    after[key] = revision
                    deletes.pop(key, None)
                    crc = zlib.crc32(op.value, revision)
                    puts[key] = (op.table, op.id, revision, op.value, crc)
            results.append((commit, revision, time_ns))
        if revision == self._revision:
            return results
        failure = self._broken or self._store(list(puts.values()), list(deletes), revision)
        if failure is not None:
            return [(commit, _again(failure), time_ns) for commit in group]
        self._revision = revision
        for key, version in after.items():
            if version:
                self._versions[key] = version
            else:
                self._versions.pop(key, None)
        return results

    def _problem(self, commit: _Commit, after: Versions) -> errors.SwarmError | None:
        """Why the commit may not be, given those before it in its group."""
        if commit.fence is not None and commit.fence != self._fence:
            leader = f"epoch {self._fence.epoch}" if self._fence else "none"
            return Deposed(
                f"node {commit.fence.node_id} led in epoch {commit.fence.epoch}, and now leads "
                f"{leader}; leave the work to the leader"
            )
        versions = self._versions
        for checks in (commit.requires, commit.ops):
            for op in checks:
                if op.expected is None:
                    continue
                key = (op.table, op.id)
                found = after.get(key)
                if found is None:
                    found = versions.get(key, 0)
                if found != op.expected:
                    return Stale(
                        f"row {op.id!r} of table {op.table} is at version {found}, not at "
                        f"{op.expected}: it has changed meanwhile; read it again and repeat"
                    )
        return None

    def _store(
        self,
        puts: Sequence[tuple[int, str, int, bytes, int]],
        deletes: Sequence[tuple[int, str]],
        revision: int,
    ) -> errors.SwarmError | None:
        """One transaction, on the disk when this returns None; else nothing of it is."""
        db = self._db
        assert db is not None
        try:
            db.execute("BEGIN IMMEDIATE")
            for start in range(0, len(puts), STATEMENT_ROWS):
                rows = puts[start : start + STATEMENT_ROWS]
                values = ",".join(["(?,?,?,?,?)"] * len(rows))
                db.execute(
                    f"REPLACE INTO rows(tbl, id, version, value, crc) VALUES {values}",
                    [field for row in rows for field in row],
                )
            for start in range(0, len(deletes), STATEMENT_ROWS):
                keys = deletes[start : start + STATEMENT_ROWS]
                values = ",".join(["(?,?)"] * len(keys))
                db.execute(
                    f"DELETE FROM rows WHERE (tbl, id) IN (VALUES {values})",
                    [field for key in keys for field in key],
                )
            db.execute("UPDATE facts SET value = ? WHERE name = 'revision'", (revision,))
            db.execute("COMMIT")
        except sqlite3.Error as error:
            return self._writing_failed(db, error)
        return None

    def _writing_failed(self, db: sqlite3.Connection, error: sqlite3.Error) -> errors.SwarmError:
        """Undoes the transaction; what to answer."""
        if db.in_transaction:
            with contextlib.suppress(sqlite3.Error):  # SQLite then has undone it already
                db.execute("ROLLBACK")
        code = getattr(error, "sqlite_errorcode", 0)
        log.error("state_write_failed", file=self.where, error=str(error), code=code)
        if code in _UNKNOWN_OUTCOME:
            # After a failed fsync the kernel may have dropped the pages and call the next one good,
            # so nothing that follows could be promised. Only reading the file anew tells what it
            # holds (Rebello et al., "Can Applications Recover from fsync Failures?", ATC 2020).
            self._broken = errors.Unavailable(
                f"the disk of {self._path} failed to sync, and nothing more is written to it; see "
                "to the disk and restart swarmd"
            )
            return errors.TimedOut(
                f"the disk of {self._path} failed to sync: whether the change was kept is known "
                "after a restart of swarmd; see to the disk first"
            )
        if _is_damage(error):
            self._broken = _damaged(self._path, str(error))
            return self._broken
        return errors.Unavailable(
            f"state file {self._path} cannot be written: {error}; nothing was changed. Free space "
            "on its disk or raise the limit on it, and try again"
        )

    def _lead(self, node_id: str) -> Fence:
        db = self._db
        assert db is not None
        if self._broken is not None:
            raise _again(self._broken)
        try:
            (epoch,) = db.execute(
                "UPDATE facts SET value = value + 1 WHERE name = 'epoch' RETURNING value"
            ).fetchall()[0]
        except sqlite3.Error as error:
            raise self._writing_failed(db, error) from error
        self._fence = Fence(node_id, epoch)
        self._tell(self._depose)
        return self._fence

    def _step_down(self, fence: Fence) -> None:
        if self._fence == fence:
            self._fence = None
            self._tell(self._depose)


# ------------------------------------------------------------------ files


def _create(path: Path) -> None:
    """Makes the file whole or not at all: a crash leaves at most `<file>.new`."""
    temporary = _beside(path, ".new")
    for suffix in ("", "-wal", "-shm", "-journal"):
        _beside(temporary, suffix).unlink(missing_ok=True)
    os.close(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    db = _connect(temporary)
    try:
        db.executescript(_SCHEMA)
    finally:
        db.close()  # folds the WAL into it, synced
    # A WAL without its file belongs to a file that somebody removed; SQLite would replay it.
    _beside(path, "-wal").unlink(missing_ok=True)
    temporary.replace(path)
    files.sync_folder(path.parent)
    files.sync_folder(path.parent.parent)  # the folder itself may be new


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=64)
    try:
        # Set before the WAL is first used, this also keeps the WAL's index out of a shared file.
        db.execute("PRAGMA locking_mode=EXCLUSIVE")
        (mode,) = db.execute("PRAGMA journal_mode=WAL").fetchone()
        db.execute("PRAGMA synchronous=FULL")
        # On macOS only F_FULLFSYNC reaches the medium; elsewhere these change nothing.
        db.execute("PRAGMA fullfsync=ON")
        db.execute("PRAGMA checkpoint_fullfsync=ON")
        db.execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}")
        db.execute(f"PRAGMA journal_size_limit={WAL_BYTES_MAX}")
        db.execute(f"PRAGMA cache_size=-{CACHE_KIB}")
        (synchronous,) = db.execute("PRAGMA synchronous").fetchone()
        if mode != "wal" or synchronous != 2:
            raise errors.Unavailable(
                f"SQLite keeps {path} in mode {mode}, synchronous {synchronous}, where a commit "
                "may be lost with the power; put the state on a local disk"
            )
    except BaseException:
        db.close()
        raise
    return db


def _check_header(path: Path) -> None:
    """What SQLite would mend or misread in silence: an empty or short file is a new one to it."""
    with path.open("rb") as file:
        header = file.read(_HEADER_BYTES)
    if not header.startswith(_MAGIC):
        found = f"begins with {header[:16]!r}" if header else "is empty"
        raise _damaged(path, f"it {found}, which no state file does")
    page_bytes = int.from_bytes(header[16:18], "big")
    page_bytes = 65536 if page_bytes == 1 else page_bytes
    pages = int.from_bytes(header[28:32], "big")
    # With a WAL beside it the file may rightly be shorter than its header says.
    if _size(path) < pages * page_bytes and not _size(_beside(path, "-wal")):
        raise _damaged(path, f"it was cut off: {_size(path)} bytes of {pages * page_bytes}")


def _damaged(path: Path, problem: str) -> Corrupt:
    return Corrupt(
        f"state file {path} is damaged: {problem}. Keep a copy of it and of {path.name}-wal, and "
        "restore the state from a backup; without one, move it away and make a new cluster"
    )


def _is_damage(error: sqlite3.Error) -> bool:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


# ------------------------------------------------------------------ futures


def _outcome(run: Callable[[], Any]) -> Any:
    try:
        return run()
    except Exception as error:  # goes to whoever waits for it
        return error


def _again(error: errors.SwarmError) -> errors.SwarmError:
    """The same error for another caller: one instance raised twice mixes their tracebacks."""
    return type(error)(error.message)


def _finish(done: asyncio.Future[Any], result: Any) -> None:
    """Answers a waiter that may have gone."""
    if done.done():
        return
    if isinstance(result, Exception):
        done.set_exception(result)
    else:
        done.set_result(result)
