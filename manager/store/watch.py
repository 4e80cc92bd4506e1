"""Who hears of which changes.

A `Watch` is one reader's bounded queue; the `Hub` knows who listens to what, hands each commit's
changes to the interested, and keeps the latest commits for readers that come back. What a commit
costs here grows with its changes and with those who listen to them, never with the number of
watches: each change names its topics, and each topic is looked up.

Order and completeness: a watch yields every commit that touches its topics, each once, in order of
revision, or it ends with WatchLost. It never leaves one out in silence.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from types import TracebackType
from typing import Any, Final, Literal

import msgspec

from manager.store import metrics
from manager.store.tables import Change
from swarm import errors
from swarm.v1 import Kind

Topic = (
    tuple[Literal["all"]]
    | tuple[Literal["kind"], Kind]
    | tuple[Literal["node"], str]
    | tuple[Literal["service"], str]
)
"""("all",): everything. ("kind", k): objects of one kind. ("node", id): that Node, and tasks bound
to it before or after the change. ("service", id): that Service and its tasks.
"""

ALL: Final[Topic] = ("all",)
WATCHES_MAX: Final = 20_000  # open at a time; each agent's session holds one
QUEUED_CHANGES_MAX: Final = 100_000  # in one watch: some seconds of the highest commit rate
HISTORY_CHANGES_MAX: Final = 50_000  # kept for from_revision, counted in changes: about 50 MB


class WatchLost(errors.Exhausted):
    """The watch missed changes and has ended: read the tables afresh and watch again."""


class Batch(msgspec.Struct, frozen=True, gc=False):
    """What one commit changed, as far as the watch's topics go. `time_ns`: unix time. `who`: asked
    this manager for it; empty: nobody did, or another manager was asked.
    """

    revision: int
    time_ns: int
    changes: tuple[Change, ...]
    who: str = ""


class Watch:
    """Batches, one per commit, for one reader; ends when it or the store is closed.

    Bounded by QUEUED_CHANGES_MAX changes (a single larger commit is taken whole): a reader that
    falls further behind gets WatchLost in place of what is missing. Not for several readers at
    once. Cancelling a wait loses nothing.
    """

    __slots__ = ("_after", "_batches", "_closed", "_hub", "_lost", "_queued", "_waiter", "topics")

    def __init__(self, hub: Hub, topics: frozenset[Topic], *, after: int) -> None:
        self.topics = topics
        self._hub = hub
        self._after = after
        self._batches: deque[Batch] = deque()
        self._queued = 0
        self._lost: WatchLost | None = None
        self._closed = False
        self._waiter: asyncio.Future[None] | None = None

    def __aiter__(self) -> Watch:
        return self

    async def __anext__(self) -> Batch:
        while True:
            if self._batches:
                batch = self._batches.popleft()
                self._queued -= len(batch.changes)
                return batch
            if self._lost is not None:
                lost, self._lost = self._lost, None
                raise lost
            if self._closed:
                raise StopAsyncIteration
            errors.invariant(self._waiter is None, "a watch has two readers")
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the watch, what it has queued included. May be called again."""
        self._batches.clear()
        self._queued = 0
        self._lost = None
        self._end()

    @property
    def pending(self) -> int:
        """Changes that wait to be read."""
        return self._queued

    def _push(self, batch: Batch) -> None:
        """Called by the hub only."""
        if batch.revision <= self._after:
            return
        if self._batches and self._queued + len(batch.changes) > QUEUED_CHANGES_MAX:
            self._lost = WatchLost(
                f"watch fell behind: {self._queued} changes wait to be read and "
                f"{len(batch.changes)} more came, the limit is {QUEUED_CHANGES_MAX}; read the "
                "state again and open a new watch"
            )
            metrics.WATCHES_LOST.inc()
            self._batches.clear()
            self._queued = 0
            self._end()
            return
        self._batches.append(batch)
        self._queued += len(batch.changes)
        self._wake()

    def _end(self) -> None:
        """No more batches come; what is queued can still be read."""
        self._hub.forget(self)
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Hub:
    """The open watches by topic, and the latest commits."""

    def __init__(self) -> None:
        self._by_topic: dict[Topic, dict[Watch, None]] = {}
        self._open: dict[Watch, None] = {}
        self._history: deque[Batch] = deque()
        self._history_changes = 0
        self._floor = 0  # every commit later than this one is in the history
        self._floor_ns = 0  # its time, or when the state was loaded

    def start(self, revision: int, now_ns: int = 0) -> None:
        """The state was loaded at this revision; commits come from now on."""
        self._floor = revision
        self._floor_ns = now_ns

    def watch(self, *topics: Topic, revision: int, from_revision: int | None) -> Watch:
        """A watch of what comes after `from_revision`, or after `revision`, the present one.

        Raises WatchLost when the history no longer reaches back, Exhausted when WATCHES_MAX are
        open.
        """
        errors.invariant(topics, "a watch needs a topic")
        if len(self._open) >= WATCHES_MAX:
            raise errors.Exhausted(
                f"{WATCHES_MAX} watches are open on this manager, the most it takes; close some, "
                "or use another manager"
            )
        after = revision if from_revision is None else from_revision
        if after < self._floor:
            raise WatchLost(
                f"changes since revision {after} are no longer kept, the oldest kept is "
                f"{self._floor + 1}; read the state again and watch from its revision"
            )
        wanted: frozenset[Topic] = frozenset((ALL,) if ALL in topics else topics)
        watch = Watch(self, wanted, after=after)
        self._open[watch] = None
        metrics.WATCHES.set(len(self._open))
        for topic in wanted:
            self._by_topic.setdefault(topic, {})[watch] = None
        for batch in self._since(after):
            if ALL in wanted:
                watch._push(batch)
            elif chosen := tuple(c for c in batch.changes if not wanted.isdisjoint(topics_of(c))):
                watch._push(Batch(batch.revision, batch.time_ns, chosen, batch.who))
        return watch

    def _since(self, revision: int) -> list[Batch]:
        """The kept commits later than a revision; cost: their number."""
        later = []
        for batch in reversed(self._history):
            if batch.revision <= revision:
                break
            later.append(batch)
        return later[::-1]

    def kept_since(self, time_ns: int) -> tuple[int, int]:
        """The revision after which a watch shows the kept commits of that time and later; and,
        where older ones than these were wanted too, the time until which none are kept, else 0.

        Commit times are the writers' clocks; where they step back, the first one in order counts.
        """
        lost_ns = self._floor_ns if time_ns < self._floor_ns else 0
        for batch in self._history:
            if batch.time_ns >= time_ns:
                return batch.revision - 1, lost_ns
        return (self._history[-1].revision if self._history else self._floor), lost_ns

    def forget(self, watch: Watch) -> None:
        """Hands the watch nothing more. May be called again."""
        if self._open.pop(watch, self) is self:
            return
        metrics.WATCHES.set(len(self._open))
        for topic in watch.topics:
            watches = self._by_topic[topic]
            del watches[watch]
            if not watches:
                del self._by_topic[topic]

    def dispatch(self, batch: Batch) -> None:
        """Takes one commit's changes."""
        self._keep(batch)
        if not self._by_topic:
            return
        for watch in tuple(self._by_topic.get(ALL, ())):
            watch._push(batch)
        if len(self._by_topic) == 1 and ALL in self._by_topic:
            return
        chosen: dict[Watch, list[Change]] = {}
        by_topic = self._by_topic
        # Watches of single services and nodes are few; where there are none, nobody works out which
        # of them a change is of.
        narrow = any(topic != ALL and topic[0] != "kind" for topic in by_topic)
        for change in batch.changes:
            topics = topics_of(change) if narrow else (("kind", change.kind),)
            for topic in topics:
                for watch in by_topic.get(topic, ()):
                    changes = chosen.setdefault(watch, [])
                    # A watch of several topics gets the change once.
                    if not changes or changes[-1] is not change:
                        changes.append(change)
        for watch, changes in chosen.items():
            watch._push(Batch(batch.revision, batch.time_ns, tuple(changes), batch.who))

    def _keep(self, batch: Batch) -> None:
        self._history.append(batch)
        self._history_changes += len(batch.changes)
        while self._history_changes > HISTORY_CHANGES_MAX and len(self._history) > 1:
            oldest = self._history.popleft()
            self._history_changes -= len(oldest.changes)
            self._floor = oldest.revision
            self._floor_ns = oldest.time_ns

    def close(self) -> None:
        """Ends every watch; what they have queued can still be read."""
        for watch in tuple(self._open):
            watch._end()

    def check_invariants(self) -> None:
        """Topics point at open watches and no others; the history is in order; for tests."""
        expected: dict[Topic, set[Watch]] = {}
        for watch in self._open:
            for topic in watch.topics:
                expected.setdefault(topic, set()).add(watch)
        errors.invariant(
            {t: set(w) for t, w in self._by_topic.items()} == expected, "topics of watches are off"
        )
        revisions = [self._floor, *(b.revision for b in self._history)]
        errors.invariant(
            all(a < b for a, b in itertools.pairwise(revisions)),
            "history is out of order",
        )
        errors.invariant(
            self._history_changes == sum(len(b.changes) for b in self._history),
            "history is miscounted",
        )


def topics_of(change: Change) -> tuple[Topic, ...]:
    """Whom a change concerns, besides ALL."""
    kind = change.kind
    of_kind: Topic = ("kind", kind)
    if kind is Kind.NODE:
        return (of_kind, ("node", change.id))
    if kind is Kind.SERVICE:
        return (of_kind, ("service", change.id))
    if kind is not Kind.TASK:
        return (of_kind,)
    return (of_kind, *_topics_of_task(change.old, change.new))


def _topics_of_task(old: Any, new: Any) -> list[Topic]:
    topics: list[Topic] = []
    for task in (old, new):
        if task is None:
            continue
        for topic in (("service", task.service_id), ("node", task.node_id)):
            if topic[1] and topic not in topics:
                topics.append(topic)
    return topics
