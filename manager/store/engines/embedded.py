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
import os
import queue
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import structlog

from manager.store.engine import EngineFacts, Fence, OnCommit, Op, Row
from manager.store.engines import preconditions, state_file
from manager.store.engines.alone import Alone
from swarm import errors
from swarm.clock import Clock

log = structlog.get_logger("store.embedded")

GROUP_OPS_MAX: Final = 20_000  # one transaction's, so that no writer waits for seconds
QUEUE_COMMITS_MAX: Final = 20_000  # beyond it commits are refused as Unavailable
STATEMENT_ROWS: Final = 2_000  # of 5 parameters each; SQLite takes 32,766 parameters
LOAD_ROWS: Final = 500
CLOSE_S: Final = 30.0
# A loop with much to do polls without waiting, which lets go of the interpreter's lock for some
# microseconds only: too short for a thread that sleeps on it to wake, and long enough to begin the
# 5 ms anew after which CPython would force a switch. The writer thread then starves: commits of up
# to 20 s were measured on two cores. So while commits wait, the loop stands still this long, this
# often, and the same commits stay below 15 ms.
GIVE_WAY_S: Final = 0.000_05
GIVE_WAY_EVERY_S: Final = 0.001

# A write or fsync of the WAL that failed in a way that leaves open what the disk holds.
_UNKNOWN_OUTCOME: Final = frozenset((sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_DIR_FSYNC))


class _Commit(NamedTuple):
    ops: Sequence[Op]
    requires: Sequence[Op]
    fence: Fence | None
    who: str
    done: asyncio.Future[int]


# Each commit with its revision or its error, and the commit time in unix ns.
Results = list[tuple[_Commit, int | errors.SwarmError, int]]


class _Call(NamedTuple):
    """Something else to be done between groups, on the writer thread."""

    run: Callable[[], Any]
    done: asyncio.Future[Any]


class EmbeddedEngine:
    """One manager's log in one file. See Engine for what its methods promise."""

    name = "embedded"
    in_touch = True  # with a log of its own

    def __init__(self, path: Path, clock: Clock) -> None:
        alone = Alone()
        self.announce, self.forget = alone.announce, alone.forget
        self.present, self.present_changed = alone.present, alone.present_changed
        self.where = str(path)
        self._path = path
        self._clock = clock
        self._lock_fd = -1
        self._db: sqlite3.Connection | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._queue: queue.SimpleQueue[_Commit | _Call | None] = queue.SimpleQueue()
        self._queued = 0  # not yet answered; of the event loop
        self._giving_way = False
        self._writer: threading.Thread | None = None
        self._on_commit: OnCommit | None = None
        self._closing = False
        self._broken: errors.SwarmError | None = None  # why nothing more is written
        self._failed = asyncio.Event()  # set once `_broken` is
        # Of the writer thread, once it runs.
        self._versions: preconditions.Versions = {}
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
        opening = asyncio.ensure_future(asyncio.to_thread(self._open))
        try:
            await asyncio.shield(opening)
        except BaseException:
            await asyncio.wait({opening})  # a thread cannot be cancelled, and it holds the lock
            self._release()
            raise
        return self._revision, self._rows()

    def _open(self) -> None:
        self._lock_fd = state_file.lock(self._path)
        self._db = state_file.open_locked(self._path, self._clock)
        self._revision = state_file.fact(self._path, self._db, "revision")

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
                        raise state_file.damaged(
                            self._path, f"row {id_!r} of table {table} is not as written"
                        )
                    versions[table, id_] = version
                    yield Row(table, id_, version, value)
        except sqlite3.Error as error:
            raise state_file.reading_failed(self._path, error) from error

    def start(self, on_commit: OnCommit) -> None:
        """Begins to write and to report."""
        errors.invariant(self._db is not None and self._writer is None, "start before load")
        self._on_commit = on_commit
        self._loop = asyncio.get_running_loop()
        self._writer = threading.Thread(target=self._write_groups, name="store", daemon=True)
        self._writer.start()

    # -------------------------------------------------------------- the event loop's side

    async def commit(
        self, ops: Sequence[Op], requires: Sequence[Op], fence: Fence | None, who: str = ""
    ) -> int:
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
        self._queue.put(_Commit(ops, requires, fence, who, done))
        self._give_way()
        return await done

    def _give_way(self) -> None:
        """Sees to it that the writer thread runs while commits wait for it; see GIVE_WAY_S."""
        if not self._giving_way:
            assert self._loop is not None
            self._giving_way = True
            self._loop.call_later(GIVE_WAY_EVERY_S, self._stand_still)

    def _stand_still(self) -> None:
        self._giving_way = False
        if self._queued:
            time.sleep(GIVE_WAY_S)
            self._give_way()

    def _check_open(self) -> None:
        if self._broken is not None:
            raise _again(self._broken)
        if self._writer is None or self._closing:
            raise errors.Unavailable(f"state file {self._path} is closed; try again later")

    def _deliver(self, results: Results) -> None:
        """Reports a group: first every commit in order, then to each of its writers."""
        assert self._on_commit is not None
        self._queued -= len(results)
        for commit, result, time_ns in results:
            if isinstance(result, int):
                try:
                    self._on_commit(result, time_ns, commit.ops, commit.who)
                except BaseException:
                    # The tables are behind the log for good: nothing may be built on them.
                    broken = self._give_up(
                        errors.Internal(
                            f"revision {result} of {self._path} could not be applied; restart "
                            "swarmd"
                        )
                    )
                    for other, _, _ in results:
                        _finish(other.done, _again(broken))
                    raise
        for commit, result, _ in results:
            _finish(commit.done, result)

    async def _on_writer(self, run: Callable[[], Any]) -> Any:
        self._check_open()
        assert self._loop is not None
        done: asyncio.Future[Any] = self._loop.create_future()
        self._queued += 1
        self._queue.put(_Call(run, done))
        self._give_way()
        try:
            return await done
        finally:
            self._queued -= 1

    async def barrier(self) -> None:
        """Nobody else commits: what the disk has is known."""
        self._check_open()

    async def facts(self) -> EngineFacts:
        """The file with its WAL; used: pages that are not free, each once."""
        facts: EngineFacts = await self._on_writer(self._measure)
        return facts

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

    async def wait_failed(self) -> errors.SwarmError:
        """See Engine."""
        await self._failed.wait()
        assert self._broken is not None
        return _again(self._broken)

    async def close(self) -> None:
        """Finishes the commits already made, folds the WAL into the file and frees it.

        May be repeated. Cancelled, or after CLOSE_S, the writer thread goes on to do so on its own.
        """
        if not self._closing:
            self._closing = True
            self._depose()
            self._queue.put(None)
        if self._writer is None:
            self._release()
        else:
            await asyncio.to_thread(self._writer.join, CLOSE_S)

    def _depose(self) -> None:
        """Wakes those who wait for the end of a leadership; on the event loop."""
        self._deposed.set()
        self._deposed = asyncio.Event()

    def _release(self) -> None:
        if self._db is not None:
            with contextlib.suppress(sqlite3.Error):  # then the next opening finds a WAL
                self._db.close()
            self._db = None
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    # -------------------------------------------------------------- the writer thread's side

    def _write_groups(self) -> None:
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
                self._tell(self._deliver, self._written(group))
            for call in calls:
                result = _outcome(call.run)
                self._tell(_finish, call.done, result)
        self._release()

    def _give_up(self, why: errors.SwarmError) -> errors.SwarmError:
        """Nothing more is written; on either thread."""
        self._broken = why
        self._tell(self._failed.set)
        return why

    def _tell(self, fn: Callable[..., None], *args: Any) -> None:
        """Runs it on the event loop; when that is gone, nobody waits for the answer."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(fn, *args)

    def _written(self, group: Sequence[_Commit]) -> Results:
        """The group's results, even where the engine itself is at fault: all get an answer."""
        try:
            return self._write(group)
        except Exception as error:
            log.exception("state_writer_defect", file=self.where)
            broken = self._give_up(
                errors.Internal(
                    f"the writer of {self._path} has a defect ({error!r}) and has stopped; restart "
                    "swarmd and report it"
                )
            )
            if self._db is not None and self._db.in_transaction:
                _outcome(self._db.rollback)
            return [(commit, _again(broken), 0) for commit in group]

    def _write(self, group: Sequence[_Commit]) -> Results:
        """Judges and writes one group; for each commit its revision or its error, and the time."""
        time_ns = self._clock.now_ns()
        after: preconditions.Versions = {}
        puts: dict[tuple[int, str], tuple[int, str, int, bytes, int]] = {}
        deletes: dict[tuple[int, str], None] = {}
        results: Results = []
        revision = self._revision
        for commit in group:
            problem = preconditions.deposed(commit.fence, self._fence) or preconditions.problem(
                commit.ops, commit.requires, latest=after, versions=self._versions
            )
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
                    f"INSERT INTO rows(tbl, id, version, value, crc) VALUES {values} "
                    "ON CONFLICT(tbl, id) DO UPDATE SET version = excluded.version, "
                    "value = excluded.value, crc = excluded.crc",
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
            self._give_up(
                errors.Unavailable(
                    f"the disk of {self._path} failed to sync, and nothing more is written to it; "
                    "see to the disk and restart swarmd"
                )
            )
            return errors.TimedOut(
                f"the disk of {self._path} failed to sync: whether the change was kept is known "
                "after a restart of swarmd; see to the disk first"
            )
        if state_file.is_damage(error):
            return self._give_up(state_file.damaged(self._path, str(error)))
        return errors.Unavailable(
            f"state file {self._path} cannot be written: {error}; nothing was changed. Free space "
            "on its disk or raise the limit on it, and try again"
        )

    def _measure(self) -> EngineFacts:
        assert self._db is not None
        try:
            size, used = state_file.sizes(self._path, self._db)
        except sqlite3.Error as error:
            raise state_file.reading_failed(self._path, error) from error
        return EngineFacts(self.name, bytes=size, bytes_used=min(size, used))

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
