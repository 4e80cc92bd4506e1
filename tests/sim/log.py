"""The log that several managers share: what etcd is to them, with a network in between.

One order of commits, judged where the log is. A manager hears of them late, in order; its own
commit returns once it has heard it. While a manager is cut off it hears nothing, its commits wait
and then fail, some of them after they were written (TimedOut). Leadership and presence are leases:
they end LEASE_S after a manager is not heard any more, by the log's clock, and by the manager's own.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from manager.store.engine import TOUCH_S, EngineFacts, Fence, OnCommit, Op, Row
from manager.store.engines import preconditions
from swarm import errors
from swarm.clock import Clock
from tests.sim.loop import SimLoop
from tests.sim.net import Net

LOG = "log"  # its host
LEASE_S = 3.0
WAIT_S = 5.0  # a commit that is not answered
POLL_S = 0.25


@dataclass(frozen=True, slots=True)
class Commit:
    """As the log has it."""

    revision: int
    time_ns: int
    ops: Sequence[Op]
    who: str
    fence: Fence | None


class SimLog:
    """`on_commit` hears of each commit when it is judged good, before any manager does."""

    def __init__(self, loop: SimLoop, net: Net, rng: random.Random) -> None:
        self.loop, self.net, self.rng = loop, net, rng
        self.rows: dict[tuple[int, str], Row] = {}
        self.versions: preconditions.Versions = {}
        self.commits: list[Commit] = []
        self.leader: Fence | None = None
        self.on_commit: Callable[[Commit], None] = lambda _: None
        self.slow_s = 0.0  # the disk of the log
        self._leader_engine: SimEngine | None = None
        self._epoch = 0
        self._engines: list[SimEngine] = []
        self.announced: dict[str, SimEngine] = {}

    @property
    def revision(self) -> int:
        return len(self.commits)

    def engine(self, host: str, clock: Clock) -> SimEngine:
        engine = SimEngine(self, host, clock)
        self._engines.append(engine)
        return engine

    def judge(self, ops: Sequence[Op], requires: Sequence[Op], fence: Fence | None) -> None:
        """Raises Stale, Deposed."""
        problem = preconditions.deposed(fence, self.leader) or preconditions.problem(
            ops, requires, latest={}, versions=self.versions
        )
        if problem is not None:
            raise problem

    def append(self, time_ns: int, ops: Sequence[Op], who: str, fence: Fence | None) -> int:
        revision = len(self.commits) + 1
        for op in ops:
            key = (op.table, op.id)
            if op.value is None:
                self.rows.pop(key, None)
                self.versions.pop(key, None)
            else:
                self.rows[key] = Row(op.table, op.id, revision, op.value)
                self.versions[key] = revision
        commit = Commit(revision, time_ns, ops, who, fence)
        self.commits.append(commit)
        self.on_commit(commit)
        for engine in self._engines:
            engine.expect()
        return revision

    # -------------------------------------------------------------- leases

    def lead(self, engine: SimEngine, node_id: str) -> Fence:
        self._epoch += 1
        self.leader, self._leader_engine = Fence(node_id, self._epoch), engine
        return self.leader

    def resign(self, fence: Fence) -> None:
        if self.leader == fence:
            self.leader = self._leader_engine = None

    def forsake(self, engine: SimEngine) -> None:
        """It was not heard for as long as a lease lasts."""
        if self._leader_engine is engine:
            self.leader = self._leader_engine = None
        for node_id, other in list(self.announced.items()):
            if other is engine:
                del self.announced[node_id]
        for other in self._engines:
            other.expect()

    def drop(self, engine: SimEngine) -> None:
        """Its process is dead."""
        if engine in self._engines:
            self._engines.remove(engine)
            engine.dead = True
            self.loop.outside(LEASE_S, self.forsake, engine)


class SimEngine:
    """One manager's end; see manager.store.engine.Engine."""

    name = "simulated"
    where = "memory"

    def __init__(self, log: SimLog, host: str, clock: Clock) -> None:
        self._log, self._host, self._clock = log, host, clock
        self._on_commit: OnCommit | None = None
        self._heard = 0
        self._heard_new = asyncio.Event()
        self._touched_s = log.loop.now_s
        self._present: frozenset[str] = frozenset()
        self._due = False
        self.dead = False

    # -------------------------------------------------------------- the way to the log

    def reached(self) -> bool:
        net = self._log.net
        return not self.dead and net.both(self._host, LOG)

    async def _there(self) -> None:
        """The way to the log. Raises Unavailable when there is none for too long."""
        until_s = self._log.loop.now_s + WAIT_S
        await asyncio.sleep(self._log.net.delay_s(self._host, LOG))
        while not self.reached():
            if self._log.loop.now_s >= until_s:
                raise errors.Unavailable("the log does not answer: nothing was written")
            await asyncio.sleep(POLL_S)

    async def _heard_of(self, revision: int) -> bool:
        """Until so much is heard; False: it takes too long."""
        until_s = self._log.loop.now_s + WAIT_S
        while self._heard < revision:
            try:
                async with asyncio.timeout_at(until_s):
                    await self._heard_new.wait()
            except TimeoutError:
                return False
        return True

    def expect(self) -> None:
        """There is something to hear."""
        if not self._due and not self.dead:
            self._due = True
            log = self._log
            log.loop.outside(log.net.delay_s(LOG, self._host), self._hear)

    def _hear(self) -> None:
        """Outside of the manager's process: what it hears is its own to do."""
        self._due = False
        if self.dead or self._on_commit is None:
            return
        if not self.reached():
            self._log.loop.outside(POLL_S, self.expect)
            return
        self.deliver()

    def deliver(self) -> None:
        """Set by the manager's process, so that it happens in it."""

    def take(self) -> None:
        """In the manager's process: takes all that has come."""
        self._touched_s = self._log.loop.now_s
        self._present = frozenset(self._log.announced)
        while self._heard < self._log.revision and self._on_commit is not None:
            commit = self._log.commits[self._heard]
            self._heard += 1
            self._on_commit(commit.revision, commit.time_ns, commit.ops, commit.who)
        self._heard_new.set()
        self._heard_new = asyncio.Event()

    async def follow(self) -> None:
        """Runs in the manager's process: hears, and keeps its leases."""
        wake = asyncio.Event()
        self.deliver = wake.set  # type: ignore[method-assign]
        loop = self._log.loop
        forsaken = False
        while True:
            try:
                async with asyncio.timeout(1.0):
                    await wake.wait()
            except TimeoutError:
                pass
            wake.clear()
            if self.reached():
                forsaken = False
                self.take()
            elif loop.now_s - self._touched_s > LEASE_S and not forsaken:
                forsaken = True
                self._log.forsake(self)
                self._heard_new.set()
                self._heard_new = asyncio.Event()

    # -------------------------------------------------------------- the engine

    async def load(self) -> tuple[int, Iterable[Row]]:
        await self._there()
        self._heard = self._log.revision
        rows = self._log.rows
        return self._heard, [rows[key] for key in sorted(rows)]

    def start(self, on_commit: OnCommit) -> None:
        self._on_commit = on_commit

    async def commit(
        self, ops: Sequence[Op], requires: Sequence[Op], fence: Fence | None, who: str = ""
    ) -> int:
        log = self._log
        self._check_open()
        await self._there()
        if log.slow_s:
            await asyncio.sleep(log.slow_s * log.rng.random())
        self._check_open()
        try:
            log.judge(ops, requires, fence)
        except errors.Conflict:
            # What it lost to is known by the time it hears so.
            if not await self._heard_of(log.revision):
                raise errors.Unavailable("the log does not answer: nothing was written") from None
            raise
        revision = log.append(self._clock.now_ns(), ops, who, fence)
        if not await self._heard_of(revision):
            raise errors.TimedOut("the log does not answer: whether it was written is not known")
        return revision

    async def barrier(self) -> None:
        await self._there()
        if not await self._heard_of(self._log.revision):
            raise errors.Unavailable("the log does not answer")

    @property
    def in_touch(self) -> bool:
        return self._log.loop.now_s - self._touched_s <= TOUCH_S

    async def announce(self, node_id: str) -> None:
        log = self._log
        try:
            while True:
                if self.reached() and log.announced.get(node_id) is not self:
                    log.announced[node_id] = self
                    for engine in log._engines:
                        engine.expect()
                await asyncio.sleep(1.0)
        finally:
            log.announced.pop(node_id, None)

    def present(self) -> frozenset[str]:
        return self._present

    async def present_changed(self, known: frozenset[str]) -> frozenset[str]:
        while self._present == known:
            await self._heard_new.wait()
        return self._present

    async def forget(self, node_id: str) -> None:
        return None

    async def facts(self) -> EngineFacts:
        return EngineFacts(self.name, bytes=0, bytes_used=0)

    async def campaign(self, node_id: str) -> Fence:
        while True:
            if self.reached() and self._log.leader is None:
                return self._log.lead(self, node_id)
            self._check_open()
            await asyncio.sleep(POLL_S * (1 + self._log.rng.random()))

    async def resign(self, fence: Fence) -> None:
        # Unheard it ends all the same, for nobody keeps its lease up any more.
        self._log.loop.outside(0 if self.reached() else LEASE_S, self._log.resign, fence)

    async def wait_deposed(self, fence: Fence) -> None:
        while True:
            if self.reached():
                if self._log.leader != fence:
                    return
            elif self._log.loop.now_s - self._touched_s > LEASE_S:
                return
            await asyncio.sleep(POLL_S)

    async def wait_failed(self) -> errors.SwarmError:
        await asyncio.get_running_loop().create_future()
        raise errors.Internal("a future that nobody holds was done")

    def _check_open(self) -> None:
        if self._on_commit is None:
            raise errors.Unavailable("the store is closed; open it again")

    async def close(self) -> None:
        self._on_commit = None
        self._heard_new.set()
