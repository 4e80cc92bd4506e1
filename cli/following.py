"""Streams that outlive the manager they come from.

A manager that goes ends its streams. What follows one asks again, at whichever manager answers then
(cli/managers.py), and gives up when none has answered for LOST_S.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

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
# Lines of several tasks come about in order of time; logs that are asked for again begin so much
# before the newest of them.
OVERLAP_NS = 10 * SECOND_NS


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
    """Control.Logs with `follow`, taken up again without a line told twice. Ends when the logs do.
    Raises Unavailable.
    """
    patience = Patience()
    shown = _Shown()
    while True:
        try:
            async for answer in connection.control.logs(request):
                patience.answered()
                yield msgspec.structs.replace(answer, lines=shown.fresh(answer.lines))
        except Unavailable as error:
            await patience.wait(error)
        else:
            return
        if shown.newest_ns and request.options is not None:
            since_ns = max(request.options.since_ns, shown.newest_ns - OVERLAP_NS)
            options = msgspec.structs.replace(request.options, since_ns=since_ns, tail=-1)
            request = msgspec.structs.replace(request, options=options)
            shown.again()


class _Shown:
    """How far each stream of each task has been shown."""

    def __init__(self) -> None:
        self.newest_ns = 0
        # The time of the last lines, and these.
        self._last: dict[tuple[str, LogStream], tuple[int, list[bytes]]] = {}
        # The same as it was when the logs were asked for again: what is repeated.
        self._before: dict[tuple[str, LogStream], tuple[int, list[bytes]]] = {}

    def again(self) -> None:
        """The lines that come now begin some time before those that were shown last."""
        self._before = {key: (at_ns, list(same)) for key, (at_ns, same) in self._last.items()}

    def fresh(self, lines: Sequence[LogLine]) -> tuple[LogLine, ...]:
        """Those that were not shown yet; they are from now on."""
        return tuple(line for line in lines if not self._repeated(line))

    def _repeated(self, line: LogLine) -> bool:
        key = line.task_id, line.stream
        at_ns, same = self._before.get(key, (0, []))
        if line.timestamp_ns < at_ns:
            return True
        if line.timestamp_ns == at_ns and line.data in same:
            same.remove(line.data)
            return True
        self.newest_ns = max(self.newest_ns, line.timestamp_ns)
        last_ns, last = self._last.get(key, (0, []))
        if line.timestamp_ns == last_ns:
            last.append(line.data)
        elif line.timestamp_ns > last_ns:
            self._last[key] = line.timestamp_ns, [line.data]
        return False


def _key(event: Event) -> tuple[str, Kind, str]:
    held = getattr(event.object, event.kind.name.lower()) if event.object is not None else None
    return event.action, event.kind, held.id if held is not None else ""
