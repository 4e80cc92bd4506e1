"""Many streams of log lines become one, roughly in the order of their times.

Each source is in order by itself. The earliest head of all goes out as soon as every open source
has a head, or when it has waited HOLD_S: a source that is silent (a task that is followed) must not
hold the others up. Bounded: a source takes QUEUED_MAX lines, then its reader waits.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import AsyncGenerator, Sequence

from swarm.v1 import LogLine

HOLD_S = 0.15
QUEUED_MAX = 1000  # lines of one source
BATCH_MAX = 500  # lines of one message


class Source:
    """One stream's lines that have not gone out yet."""

    __slots__ = ("_merger", "lines", "room")

    def __init__(self, merger: Merger) -> None:
        self._merger = merger
        self.lines: deque[tuple[float, LogLine]] = deque()  # with the time of arrival
        self.room = asyncio.Event()
        self.room.set()

    async def put(self, lines: Sequence[LogLine]) -> None:
        """Takes lines; waits while the source is full."""
        for line in lines:
            await self.room.wait()
            self._merger.take(self, line)

    def close(self) -> None:
        """No more lines come. May be called again."""
        self._merger.end(self)


class Merger:
    """Takes lines of many sources, gives batches of one stream."""

    def __init__(self) -> None:
        self._open: set[Source] = set()
        self._silent = 0  # open sources without a line
        # One entry per source that has lines: time of its first one, a number against ties.
        self._heads: list[tuple[int, int, Source]] = []
        self._count = 0
        self._held_open = False
        self._woken = asyncio.Event()

    def source(self) -> Source:
        source = Source(self)
        self._open.add(source)
        self._silent += 1
        return source

    def hold_open(self) -> None:
        """More sources may come: the stream does not end before `release`."""
        self._held_open = True

    def release(self) -> None:
        self._held_open = False
        self.wake()

    def wake(self) -> None:
        """The reader gets a batch soon, an empty one if need be."""
        self._woken.set()

    def take(self, source: Source, line: LogLine) -> None:
        source.lines.append((_now_s(), line))
        if len(source.lines) == 1:
            self._silent -= 1
            self._push(source)
        if len(source.lines) >= QUEUED_MAX:
            source.room.clear()
        self.wake()

    def end(self, source: Source) -> None:
        if source in self._open:
            self._open.discard(source)
            self._silent -= not source.lines
        self.wake()

    async def batches(self) -> AsyncGenerator[tuple[LogLine, ...], None]:
        """Batches of lines until every source is closed and empty; may be empty when woken."""
        while True:
            self._woken.clear()
            batch = self._ready()
            ended = not self._open and not self._heads and not self._held_open
            yield batch
            if ended:
                return
            if len(batch) == BATCH_MAX:
                continue
            await self._wait()

    async def _wait(self) -> None:
        """Until something comes, or the earliest line has waited long enough."""
        if not self._heads:
            await self._woken.wait()
            return
        arrived_s = self._heads[0][2].lines[0][0]
        left_s = max(0.0, HOLD_S - (_now_s() - arrived_s))
        try:
            async with asyncio.timeout(left_s):
                await self._woken.wait()
        except TimeoutError:
            return

    def _ready(self) -> tuple[LogLine, ...]:
        out: list[LogLine] = []
        while self._heads and len(out) < BATCH_MAX and self._may_go():
            _, _, source = heapq.heappop(self._heads)
            out.append(source.lines.popleft()[1])
            if source.lines:
                self._push(source)
            elif source in self._open:
                self._silent += 1
            if len(source.lines) < QUEUED_MAX // 2:
                source.room.set()
        return tuple(out)

    def _may_go(self) -> bool:
        if not self._silent:
            return True
        arrived_s = self._heads[0][2].lines[0][0]
        return _now_s() - arrived_s >= HOLD_S

    def _push(self, source: Source) -> None:
        self._count += 1
        heapq.heappush(self._heads, (source.lines[0][1].timestamp_ns, self._count, source))


def _now_s() -> float:
    """The event loop's time, on which the waits are measured as well."""
    return asyncio.get_running_loop().time()
