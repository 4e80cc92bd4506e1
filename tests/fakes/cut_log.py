"""One log in memory under several managers' stores, each of which may be cut off from it.

What the engines of several managers on one etcd are to each other when the network between them is
bad (tests/fakes/shared_log.py is about the order in which they hear of things). `present` is who is
announced; tests say so themselves. An engine that is cut hears nothing, and its commits wait for as
long as it is; `hold_commits` lets it hear and keeps its own commits from being judged.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from manager.store.engine import EngineFacts, Fence, OnCommit, Op, Row
from manager.store.engines.memory import MemoryEngine
from swarm import errors
from swarm.clock import Clock


class CutLog:
    """The log. `engine` makes one manager's way to it."""

    def __init__(self, clock: Clock) -> None:
        self.inner = MemoryEngine(clock)
        self.commits: list[tuple[int, int, Sequence[Op], str]] = []
        self.present: frozenset[str] = frozenset()
        self._changed = asyncio.Event()
        self._engines: list[CutEngine] = []
        self.inner.start(self._take)

    def engine(self, *, announced: str = "") -> CutEngine:
        engine = CutEngine(self)
        self._engines.append(engine)
        if announced:
            self.arrive(announced)
        return engine

    def _take(self, revision: int, time_ns: int, ops: Sequence[Op], who: str) -> None:
        self.commits.append((revision, time_ns, ops, who))
        for engine in self._engines:
            engine.hear()

    def arrive(self, node_id: str) -> None:
        """The manager is announced."""
        self._show(self.present | {node_id})

    def leave(self, node_id: str) -> None:
        """The manager is not announced any more."""
        self._show(self.present - {node_id})

    def _show(self, present: frozenset[str]) -> None:
        self.present = present
        self._changed.set()
        self._changed = asyncio.Event()

    async def present_changed(self, known: frozenset[str]) -> frozenset[str]:
        while self.present == known:
            await self._changed.wait()
        return self.present


class CutEngine:
    """See manager.store.engine.Engine."""

    name = "cut"
    where = "memory"

    def __init__(self, log: CutLog) -> None:
        self._log = log
        self._on_commit: OnCommit | None = None
        self._heard = 0
        self.in_touch = True
        self._reached = asyncio.Event()
        self._reached.set()
        self._committing = asyncio.Event()
        self._committing.set()

    # -------------------------------------------------------------- faults

    def cut(self) -> None:
        """Off from the log, and aware of it."""
        self.in_touch = False
        self._reached.clear()

    def lag(self) -> None:
        """Off from the log, and not aware of it yet."""
        self._reached.clear()

    def heal(self) -> None:
        self._reached.set()
        self.hear()
        self.in_touch = True

    def hold_commits(self) -> None:
        self._committing.clear()

    def let_commits(self) -> None:
        self._committing.set()

    # -------------------------------------------------------------- the engine

    def hear(self) -> None:
        while self._reached.is_set() and self._on_commit and self._heard < len(self._log.commits):
            self._heard += 1
            self._on_commit(*self._log.commits[self._heard - 1])

    async def load(self) -> tuple[int, Iterable[Row]]:
        self._heard = len(self._log.commits)
        return await self._log.inner.load()

    def start(self, on_commit: OnCommit) -> None:
        self._on_commit = on_commit
        self.hear()

    async def commit(
        self, ops: Sequence[Op], requires: Sequence[Op], fence: Fence | None, who: str = ""
    ) -> int:
        while not (self._reached.is_set() and self._committing.is_set()):
            await self._reached.wait()
            await self._committing.wait()
        if self._on_commit is None:
            raise errors.Unavailable("the store is closed; open it again")
        return await self._log.inner.commit(ops, requires, fence, who)

    async def barrier(self) -> None:
        await self._reached.wait()

    async def announce(self, node_id: str) -> None:
        self._log.arrive(node_id)
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self._log.leave(node_id)

    def present(self) -> frozenset[str]:
        return self._log.present

    async def present_changed(self, known: frozenset[str]) -> frozenset[str]:
        return await self._log.present_changed(known)

    async def forget(self, node_id: str) -> None:
        return None

    async def facts(self) -> EngineFacts:
        return await self._log.inner.facts()

    async def campaign(self, node_id: str) -> Fence:
        return await self._log.inner.campaign(node_id)

    async def resign(self, fence: Fence) -> None:
        await self._log.inner.resign(fence)

    async def wait_deposed(self, fence: Fence) -> None:
        await self._log.inner.wait_deposed(fence)

    async def wait_failed(self) -> errors.SwarmError:
        return await self._log.inner.wait_failed()

    async def close(self) -> None:
        self._on_commit = None
        self._reached.set()  # whoever waits is told
        self._committing.set()
