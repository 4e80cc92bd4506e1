"""A log without a disk: for tests and simulation, where it stands in for the embedded engine.

It keeps the same promises but durability, and is checked by the same tests. After `close` it can be
loaded again, by another store, as a file could.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from manager.store.engine import EngineFacts, Fence, OnCommit, Op, Row
from manager.store.engines import preconditions
from manager.store.engines.alone import Alone
from swarm import errors
from swarm.clock import Clock


class MemoryEngine:
    """See Engine for what its methods promise. `failing` makes commits fail with that error."""

    name = "memory"
    in_touch = True  # with a log of its own
    where = "memory"

    def __init__(self, clock: Clock) -> None:
        alone = Alone()
        self.announce, self.forget = alone.announce, alone.forget
        self.present, self.present_changed = alone.present, alone.present_changed
        self.failing: errors.SwarmError | None = None
        self._clock = clock
        self._rows: dict[tuple[int, str], Row] = {}
        self._versions: preconditions.Versions = {}
        self._revision = 0
        self._epoch = 0
        self._fence: Fence | None = None
        self._deposed = asyncio.Event()
        self._on_commit: OnCommit | None = None

    async def load(self) -> tuple[int, Iterable[Row]]:
        """The rows as they are, by table and id."""
        return self._revision, [self._rows[key] for key in sorted(self._rows)]

    def start(self, on_commit: OnCommit) -> None:
        """Begins to report."""
        self._on_commit = on_commit

    async def commit(
        self, ops: Sequence[Op], requires: Sequence[Op], fence: Fence | None, who: str = ""
    ) -> int:
        """See Engine. Takes one turn of the event loop, in which others may commit first."""
        await asyncio.sleep(0)
        self._check_open()
        if self.failing is not None:
            raise type(self.failing)(self.failing.message)
        problem = preconditions.deposed(fence, self._fence) or preconditions.problem(
            ops, requires, latest={}, versions=self._versions
        )
        if problem is not None:
            raise problem
        self._revision += 1
        for op in ops:
            key = (op.table, op.id)
            if op.value is None:
                self._rows.pop(key, None)
                self._versions.pop(key, None)
            else:
                self._rows[key] = Row(op.table, op.id, self._revision, op.value)
                self._versions[key] = self._revision
        assert self._on_commit is not None
        self._on_commit(self._revision, self._clock.now_ns(), ops, who)
        return self._revision

    async def barrier(self) -> None:
        """Nobody else commits: all is known."""
        self._check_open()

    async def facts(self) -> EngineFacts:
        """The rows' values, all of them in use."""
        size = sum(len(row.value) for row in self._rows.values())
        return EngineFacts(self.name, bytes=size, bytes_used=size)

    def _check_open(self) -> None:
        if self._on_commit is None:
            raise errors.Unavailable("the store is closed; open it again")

    async def campaign(self, node_id: str) -> Fence:
        """Leads at once; an earlier leadership ends."""
        self._epoch += 1
        self._depose(Fence(node_id, self._epoch))
        assert self._fence is not None
        return self._fence

    async def resign(self, fence: Fence) -> None:
        """Ends this leadership, if it is the present one."""
        if self._fence == fence:
            self._depose(None)

    async def wait_deposed(self, fence: Fence) -> None:
        """Returns when another campaign, `resign` or `close` has ended this leadership."""
        while self._fence == fence:
            await self._deposed.wait()

    async def wait_failed(self) -> errors.SwarmError:
        """Memory does not fail: waits for ever."""
        await asyncio.get_running_loop().create_future()
        raise errors.Internal("a future that nobody holds was done")

    async def close(self) -> None:
        """Refuses commits from now on."""
        self._on_commit = None
        self._depose(None)

    def _depose(self, successor: Fence | None) -> None:
        self._fence = successor
        self._deposed.set()
        self._deposed = asyncio.Event()
