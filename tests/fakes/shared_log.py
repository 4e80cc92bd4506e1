"""One log under several stores, in memory: what several managers on one etcd are to each other.

A replica hears of the others' commits late, as a manager that lags behind does: with its own next
commit, with a barrier, when it lost a race, or at some turn of the event loop. When, the seed says,
so that a run can be repeated. Leadership and presence are each replica's own, as with one manager.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from manager.store.engine import Fence, Op, Row
from manager.store.engines import preconditions
from manager.store.engines.memory import MemoryEngine
from swarm.clock import Clock

TURNS_MAX = 4  # of the event loop, until a commit is judged and until it is heard of


@dataclass(slots=True)
class SharedLog:
    """The commits in order, and the rows that they have led to."""

    seed: int
    rows: dict[tuple[int, str], Row] = field(default_factory=dict)
    versions: preconditions.Versions = field(default_factory=dict)
    commits: list[tuple[int, int, Sequence[Op], str]] = field(default_factory=list)
    rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)

    async def turns(self) -> None:
        for _ in range(self.rng.randrange(TURNS_MAX)):
            await asyncio.sleep(0)

    def append(self, time_ns: int, ops: Sequence[Op], who: str) -> int:
        revision = len(self.commits) + 1
        for op in ops:
            key = (op.table, op.id)
            if op.value is None:
                self.rows.pop(key, None)
                self.versions.pop(key, None)
            else:
                self.rows[key] = Row(op.table, op.id, revision, op.value)
                self.versions[key] = revision
        self.commits.append((revision, time_ns, ops, who))
        return revision


class Replica(MemoryEngine):
    """One manager's end of the log; see Engine for what its methods promise."""

    def __init__(self, log: SharedLog, clock: Clock) -> None:
        super().__init__(clock)
        self._log = log
        self._heard = 0  # commits

    async def load(self) -> tuple[int, Iterable[Row]]:
        self._heard = len(self._log.commits)
        return self._heard, [self._log.rows[key] for key in sorted(self._log.rows)]

    async def commit(
        self, ops: Sequence[Op], requires: Sequence[Op], fence: Fence | None, who: str = ""
    ) -> int:
        await self._log.turns()
        self._check_open()
        problem = preconditions.problem(ops, requires, latest={}, versions=self._log.versions)
        if problem is not None:
            self._hear(len(self._log.commits))
            raise problem
        revision = self._log.append(self._clock.now_ns(), ops, who)
        await self._log.turns()
        self._hear(revision)
        return revision

    async def barrier(self) -> None:
        await self._log.turns()
        self._check_open()
        until = len(self._log.commits)
        await self._log.turns()
        self._hear(until)

    def lag(self) -> None:
        """Hears of some of what it has not heard of yet."""
        self._hear(self._log.rng.randint(self._heard, len(self._log.commits)))

    def _hear(self, until: int) -> None:
        while self._heard < until:
            commit = self._log.commits[self._heard]
            self._heard += 1
            assert self._on_commit is not None
            self._on_commit(*commit)
