"""What the store asks of the log of changes beneath it. Engines: embedded (SQLite), etcd.

An engine keeps opaque rows keyed by (table, id), orders commits, makes them durable, and reports
each one, its own and other managers', exactly once and in order through `on_commit`. It knows
nothing of objects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import msgspec

from swarm import errors


class Stale(errors.Conflict):
    """A commit relied on a row that has changed since; read again and try again."""


class Deposed(Stale):
    """The commit's fence is not the leadership any more; trying again cannot help."""


class Corrupt(errors.SwarmError):
    """The state on disk is damaged or of an unknown format. Says which file and what to do."""


# Op and Row are made by the ten thousand; a frozen struct costs a sixth of a frozen dataclass.
class Op(msgspec.Struct, frozen=True, gc=False):
    """Put (`value` set) or delete (None) one row, if it is at `expected` (0: absent; None: whatever
    it is).
    """

    table: int
    id: str
    value: bytes | None
    expected: int | None


class Row(msgspec.Struct, frozen=True, gc=False):
    """A row as stored; `version` is the revision of the commit that wrote it."""

    table: int
    id: str
    version: int
    value: bytes


@dataclass(frozen=True, slots=True)
class Fence:
    """Leadership as a precondition: the commit fails with Deposed unless this leader is still the
    leader.
    """

    node_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What people are told of an engine. `version`: "etcd 3.4.23", "embedded". `bytes`: what its
    file, or its database on the member that answers, takes on the disk; `bytes_used`: as much of
    them as holds something.
    """

    version: str
    bytes: int
    bytes_used: int


TOUCH_S: Final = 2.5
"""The longest that a manager may go without reaching the log and still count as in touch with it:
longer than an election of etcd's leader (0.6 to 1.2 s), shorter than the silence of a lost node.
"""

OnCommit = Callable[[int, int, Sequence[Op], str], None]
"""revision, commit time (unix ns), the ops, who asked for them ("": nobody, the cluster itself);
called on the event loop before the commit's caller resumes.
"""


class Engine(Protocol):
    """One log of changes. `where` names it in messages: its file, or its endpoints."""

    name: str
    where: str

    async def load(self) -> tuple[int, Iterable[Row]]:
        """The state to start from: its revision and all rows. Raises Corrupt. Call once, before the
        first commit.
        """
        ...

    def start(self, on_commit: OnCommit) -> None:
        """Begins to report commits later than what `load` returned."""
        ...

    async def commit(
        self, ops: Sequence[Op], requires: Sequence[Op], fence: Fence | None, who: str = ""
    ) -> int:
        """Makes the ops durable, all or none, and returns the revision. `who` asked for them; it
        travels in the log, so that every manager reports it.

        `requires` are checked (their `expected`), not written. Raises Stale (precondition lost; the
        commit it lost to has been reported by then, so that reading again shows it), Deposed (the
        fence), Unavailable (disk full, no quorum; nothing was written), TimedOut (unknown whether
        it was). Cancelling the caller does not undo the commit.
        """
        ...

    async def barrier(self) -> None:
        """Returns once all is reported that any manager had committed before this call. Raises
        Unavailable where that cannot be known: the log is not reached.
        """
        ...

    @property
    def in_touch(self) -> bool:
        """Whether what this manager knows was all of the log at some moment of the last TOUCH_S.
        False: it may be old, and others may have counted this manager out. Known while `announce`
        runs, which asks for it; before that, and where there is one manager only, True.
        """
        ...

    async def announce(self, node_id: str) -> None:
        """Shows the others that the manager of this node is there; runs until cancelled, which
        takes the notice back. One that dies, or is cut off from the log, is absent some 3 s later.
        """
        ...

    def present(self) -> frozenset[str]:
        """The node ids of the managers that are announced, as far as the log has shown."""
        ...

    async def present_changed(self, known: frozenset[str]) -> frozenset[str]:
        """Returns who is present once that is not `known`."""
        ...

    async def forget(self, node_id: str) -> None:
        """Removes what the log keeps of a manager that is gone for good. Nothing that it had sent
        takes effect after this. Raises Unavailable, TimedOut; may be repeated.
        """
        ...

    async def facts(self) -> EngineFacts:
        """Version and sizes. Raises Unavailable."""
        ...

    async def campaign(self, node_id: str) -> Fence:
        """Waits until this manager is the leader."""
        ...

    async def resign(self, fence: Fence) -> None:
        """Gives leadership up."""
        ...

    async def wait_deposed(self, fence: Fence) -> None:
        """Returns when the leadership is lost."""
        ...

    async def wait_failed(self) -> errors.SwarmError:
        """Returns when this engine can write no more until it is opened afresh, with the reason.
        A full disk or a lost quorum is no such failure.
        """
        ...

    async def close(self) -> None: ...
