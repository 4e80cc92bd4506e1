"""Disks: the agents' memory of their tasks, and the state file of a manager that is alone.

An agent's disk keeps what was written and not synced only by chance when the machine loses power,
and may damage the file. A manager's state file is the real one, in SQLite's format, opened and
recovered by the real engine; only its writer thread is replaced by a turn of the loop. At a crash
the transaction that was under way may be torn: the log of the file is cut off at any byte of it,
with rubbish behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from agent.state import Record, StateFile, _without_credentials
from manager.store.engine import OnCommit
from manager.store.engines import embedded
from manager.store.engines.embedded import EmbeddedEngine
from swarm import errors
from swarm.clock import Clock
from swarm.v1 import Assignment, TaskStatus, decode, encode
from tests.sim.loop import SimLoop

FAST = Path("/dev/shm")


class AgentDisk:
    """What outlives an agent. Each batch is one write; the last ones may be lost."""

    UNSYNCED = 3  # writes that a power cut may lose

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.rows: dict[str, tuple[bytes, bytes]] = {}
        self._before: list[dict[str, tuple[bytes, bytes] | None]] = []  # to undo, newest last
        self.damaged = False

    def write(self, changes: Mapping[str, tuple[bytes, bytes] | None]) -> None:
        self._before.append({id_: self.rows.get(id_) for id_ in changes})
        del self._before[: -self.UNSYNCED]
        for id_, row in changes.items():
            if row is None:
                self.rows.pop(id_, None)
            else:
                self.rows[id_] = row

    def lose_power(self) -> int:
        """Some of the last writes never came to the disk; how many."""
        lost = self.rng.randrange(len(self._before) + 1)
        for _ in range(lost):
            for id_, row in self._before.pop().items():
                if row is None:
                    self.rows.pop(id_, None)
                else:
                    self.rows[id_] = row
        return lost


class SimStateFile(StateFile):
    """The real batches and forms of agent.state, on a simulated disk."""

    def __init__(self, disk: AgentDisk) -> None:
        super().__init__(Path("/nonexistent"))
        self._thread.shutdown()
        self._disk = disk

    async def open(self) -> tuple[Record, ...]:
        await asyncio.sleep(0.005)
        if self._disk.damaged:
            self._disk.damaged = False
            self._disk.rows.clear()
            self.problem = "the file was damaged; started without records"
        return tuple(
            Record(decode(Assignment, a), decode(TaskStatus, s))
            for _, (a, s) in sorted(self._disk.rows.items())
        )

    async def _in_thread(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        await asyncio.sleep(0.002)
        return fn(*args, **kwargs)

    def _write(self, batch: Mapping[str, Record | None]) -> None:
        self._disk.write(
            {
                id_: None
                if r is None
                else (encode(_without_credentials(r.assignment)), encode(r.status))
                for id_, r in batch.items()
            }
        )

    def _close(self) -> None:
        return None


class ManagerDisk:
    """The folder of a manager's state file, which outlives its processes."""

    def __init__(self, rng: random.Random, seed: int) -> None:
        self.rng = rng
        top = FAST if FAST.is_dir() and os.access(FAST, os.W_OK) else Path("/tmp")
        self.folder = top / f"swarm-sim-{os.getpid()}-{seed}"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.boots = 0
        self.path = self.folder / "0" / "state.db"

    def crash(self, engine: DiskEngine) -> str:
        """The next boot finds the file as a crash left it; says how."""
        self.boots += 1
        after = self.folder / str(self.boots) / "state.db"
        after.parent.mkdir()
        wal, torn = self._wal(self.path), ""
        if engine.synced_bytes is not None:
            # The transaction was not answered: it may be there whole, not at all, or torn.
            size = wal.stat().st_size if wal.exists() else 0
            keep = self.rng.randint(min(engine.synced_bytes, size), size)
            torn = f"torn at {keep - engine.synced_bytes} of {size - engine.synced_bytes} bytes"
        for suffix in ("", "-wal"):
            source = self.path.with_name(self.path.name + suffix)
            if source.exists():
                shutil.copyfile(source, after.with_name(after.name + suffix))
        if torn:
            with self._wal(after).open("r+b") as file:
                file.truncate(keep)
                file.seek(keep)
                file.write(self.rng.randbytes(self.rng.choice((0, 7, 600))))
        self.path = after
        return torn or "whole"

    @staticmethod
    def _wal(path: Path) -> Path:
        return path.with_name(path.name + "-wal")

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class DiskEngine(EmbeddedEngine):
    """The embedded engine, its writer a callback: commits that come in WRITE_S form a group."""

    WRITE_S = 0.002

    def __init__(self, disk: ManagerDisk, clock: Clock, loop: SimLoop) -> None:
        super().__init__(disk.path, clock)
        self._sim = loop
        self._disk = disk
        self._flushing = False
        self.on_written: Callable[[embedded.Results], None] = lambda _: None
        self.slow_s = 0.0
        self.full = False
        # Bytes of the WAL before a transaction that nobody was told of; None: there is none.
        self.synced_bytes: int | None = None
        self.pending: embedded.Results = []  # written, and not answered yet

    def start(self, on_commit: OnCommit) -> None:
        self._on_commit = on_commit
        self._loop = asyncio.get_running_loop()
        self._writer = self  # type: ignore[assignment]  # nobody joins it: see close

    def _give_way(self) -> None:
        if not self._flushing:
            self._flushing = True
            delay_s = self.WRITE_S + self.slow_s * self._disk.rng.random()
            self._sim.call_later(delay_s, self._flush)

    def _flush(self) -> None:
        self._flushing = False
        group: list[embedded._Commit] = []
        calls: list[embedded._Call] = []
        with contextlib.suppress(queue.Empty):
            while True:
                item = self._queue.get_nowait()
                if isinstance(item, embedded._Commit):
                    group.append(item)
                elif item is not None:
                    calls.append(item)
        if group:
            wal = ManagerDisk._wal(self._path)
            self.synced_bytes = wal.stat().st_size if wal.exists() else 0
            results = self._refuse(group) if self.full else self._written(group)
            self.pending = results
            # Between the write and the answer the machine may stop.
            self._sim.call_later(self.WRITE_S, self._answer, results)
        for call in calls:
            result = embedded._outcome(call.run)
            self._tell(embedded._finish, call.done, result)

    def _answer(self, results: embedded.Results) -> None:
        self.synced_bytes, self.pending = None, []
        self.on_written(results)
        self._deliver(results)

    def _refuse(self, group: Sequence[embedded._Commit]) -> embedded.Results:
        text = "state file cannot be written: disk full; nothing was changed"
        return [(commit, errors.Unavailable(text), 0) for commit in group]

    async def close(self) -> None:
        if not self._closing:
            self._closing = True
            self._depose()
            if self._db is not None:
                self._flush()
        await asyncio.sleep(0.01)
        self._release()

    def let_go(self) -> None:
        """The process is dead: the kernel closes its files."""
        self._release()
