"""Streams that outlive the manager they come from.

A manager that goes ends its streams. What follows one asks again, at whichever manager answers then
(cli/managers.py), and gives up when none has answered for LOST_S.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import cast

import msgspec

from cli.connection import Connection
from swarm.clock import SECOND_NS
from swarm.errors import NotManager, SwarmError, Unavailable
from swarm.v1 import (
    Event,
    Kind,
    ListRequest,
    LogLine,
    LogsRequest,
    LogsResponse,
    LogStream,
    WatchRequest,
    WatchResponse,
)

__all__ = ["LOST_S", "Patience", "follow_logs", "watch"]

LOST_S = 30.0  # how long no manager may answer before waiting is given up
RETRY_S = 0.5
# Lines of several tasks come about in order of time, but a node may have been out of reach for some
# seconds; logs that are asked for again begin so much before the newest line.
OVERLAP_NS = 30 * SECOND_NS
SETTLE_S = 20.0  # how long nodes may take to come to the manager that goes on
STREAMS_MAX = 1000  # remembered in any case; older ones are forgotten when there are more


class Patience:
    """How long nobody has answered."""

    def __init__(self) -> None:
        self._lost_s: float | None = None

    def answered(self) -> None:
        """Somebody has."""
        self._lost_s = None

    async def wait(self, error: SwarmError | None) -> None:
        """Waits before the next try; raises the error, if there is one, when it has been long
        enough, and at once when it says that there is no manager to wait for.
        """
        now_s = asyncio.get_running_loop().time()
        self._lost_s = now_s if self._lost_s is None else self._lost_s
        if error is not None and (isinstance(error, NotManager) or now_s - self._lost_s > LOST_S):
            raise error
        await asyncio.sleep(RETRY_S)


async def watch(connection: Connection, request: WatchRequest) -> AsyncIterator[WatchResponse]:
    """Control.Watch, taken up again without a gap and without a change told twice. An answer
    without events says that it stands (again). Ends when the time that the request names has come.
    Raises Unavailable, and Exhausted where the manager that goes on no longer keeps what was
    missed.
    """
    if not request.from_revision and not request.since_ns:
        # What was missed can be named only by a revision.
        now = await connection.control.list(ListRequest(kind=Kind.CLUSTER))
        request = msgspec.structs.replace(request, from_revision=now.revision + 1)
    patience = Patience()
    # The last revision seen, and what of it was seen: a commit may take several messages.
    at, seen = 0, set[tuple[str, Kind, str]]()
    while True:
        try:
            async for answer in connection.control.watch(request):
                patience.answered()
                fresh = [e for e in answer.events if e.revision > at or _key(e) not in seen]
                for event in fresh:
                    if event.revision > at:
                        at, seen = event.revision, set()
                    seen.add(_key(event))
                if fresh or not answer.events:
                    yield msgspec.structs.replace(answer, events=tuple(fresh))
        except Unavailable as error:
            await patience.wait(error)
        else:
            return
        if at:
            request = msgspec.structs.replace(request, from_revision=at, since_ns=0)


async def follow_logs(connection: Connection, request: LogsRequest) -> AsyncIterator[LogsResponse]:
    """Control.Logs with `follow`, taken up again without a line lost or told twice. Ends when the
    logs do. Raises Unavailable.

    Nodes come to the manager that goes on one by one. One that is not there yet is a problem to
    that manager, which reads it no more in this call; so the logs are asked for again, from the
    same time on, until all nodes are there or SETTLE_S have passed.
    """
    now_s = asyncio.get_running_loop().time
    patience = Patience()
    shown = _Shown()
    lost_s: float | None = None
    while True:
        settled = True
        try:
            async with aclosing(_answers(connection, request)) as answers:
                async for answer in answers:
                    patience.answered()
                    fresh = shown.fresh(answer.lines)
                    settled = not answer.problems or lost_s is None or now_s() - lost_s > SETTLE_S
                    problems = answer.problems if settled else ()
                    if fresh or problems:
                        yield msgspec.structs.replace(answer, lines=fresh, problems=problems)
                    if not settled:
                        break
        except Unavailable as error:
            if lost_s is None or now_s() - lost_s > SETTLE_S:
                shown.lost()
            lost_s = now_s()
            await patience.wait(error)
        else:
            if settled:
                return
            await asyncio.sleep(RETRY_S)
        if shown.from_ns and request.options is not None:
            since_ns = max(request.options.since_ns, shown.from_ns)
            options = msgspec.structs.replace(request.options, since_ns=since_ns, tail=-1)
            request = msgspec.structs.replace(request, options=options)
            shown.again()


def _answers(connection: Connection, request: LogsRequest) -> AsyncGenerator[LogsResponse, None]:
    # Streams of a channel are generators, whose closing cancels the call.
    return cast("AsyncGenerator[LogsResponse, None]", connection.control.logs(request))


class _Last:
    """The newest lines of one stream of one task: their time, and how often there is which."""

    __slots__ = ("at_ns", "same")

    def __init__(self, at_ns: int, same: Counter[int]) -> None:
        self.at_ns = at_ns
        # By hash: a line may be long, and there may be many of one moment.
        self.same = same


class _Shown:
    """How far each stream of each task has been shown."""

    def __init__(self) -> None:
        self._newest_ns = 0
        # What is asked for again begins here; 0: nothing was shown.
        self.from_ns = 0
        self._last: dict[tuple[str, LogStream], _Last] = {}
        # The same as it was when the logs were asked for again: what is repeated.
        self._before: dict[tuple[str, LogStream], _Last] = {}

    def lost(self) -> None:
        """The stream has broken off: its successors begin some time before what was shown last."""
        self.from_ns = max(1, self._newest_ns - OVERLAP_NS) if self._newest_ns else 0

    def again(self) -> None:
        """The lines that come now are the ones from there on."""
        self._before = {
            key: _Last(last.at_ns, Counter(last.same)) for key, last in self._last.items()
        }

    def fresh(self, lines: Sequence[LogLine]) -> tuple[LogLine, ...]:
        """Those that were not shown yet; they are from now on."""
        found = tuple(line for line in lines if not self._repeated(line))
        if len(self._last) > STREAMS_MAX:
            self._forget()
        return found

    def _forget(self) -> None:
        """Streams whose lines will not be asked for again."""
        ended_ns = self._newest_ns - 2 * OVERLAP_NS
        self._last = {key: last for key, last in self._last.items() if last.at_ns > ended_ns}

    def _repeated(self, line: LogLine) -> bool:
        key = line.task_id, line.stream
        before = self._before.get(key)
        if before is not None:
            if line.timestamp_ns < before.at_ns:
                return True
            if line.timestamp_ns == before.at_ns and before.same[hash(line.data)]:
                before.same[hash(line.data)] -= 1
                return True
            if line.timestamp_ns > before.at_ns:
                # From here on all is new, whatever the node's clock does.
                del self._before[key]
        self._newest_ns = max(self._newest_ns, line.timestamp_ns)
        last = self._last.get(key)
        if last is not None and last.at_ns == line.timestamp_ns:
            last.same[hash(line.data)] += 1
        elif last is None or line.timestamp_ns > last.at_ns:
            self._last[key] = _Last(line.timestamp_ns, Counter((hash(line.data),)))
        return False


def _key(event: Event) -> tuple[str, Kind, str]:
    held = getattr(event.object, event.kind.name.lower()) if event.object is not None else None
    return event.action, event.kind, held.id if held is not None else ""
